"""optimum-onnx's dense fp32 export, made in an environment of its own, since it needs another transformers than edgec.

EDGEC_OPTIMUM_PYTHON names that environment's interpreter (`make optimum-env` makes one); creating it here was turned
down, because a measurement should not need a network. What comes out is run by the worker like any other graph: an
encoder's token states are pooled by the loader, and a causal LM's folder gets the genai_config.json that lets
onnxruntime-genai drive its key and value inputs, a faster loop than optimum's own in Python.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgec import limits
from edgec.bench.baselines import CHECKPOINT, copy_tokenizer
from edgec.errors import BenchError
from edgec.pooling import read_pooling
from edgec.runtime.layout import optional_json, read_json, whole_number
from edgec.subprocesses import run

PLUGIN = True
TASKS = ("encoder", "causal-lm")
NAME = "optimum"
TOOL = "optimum-onnx, fp32"
SOURCE = CHECKPOINT

INTERPRETER = "EDGEC_OPTIMUM_PYTHON"


def missing() -> str:
    """Why no export can be made; "" when one can be tried."""
    told = os.environ.get(INTERPRETER, "")
    if not told:
        return f"set {INTERPRETER} to the python of an environment with optimum-onnx; `make optimum-env` makes one"
    return "" if Path(told).is_file() else f"{INTERPRETER} is {told!r}, which is no file"


def build(source: Path, out: Path) -> None:
    config = read_json(source / "config.json")
    causal = any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ())
    if not causal and (pooling := read_pooling(source)) is not None and pooling.mode != "mean":
        raise BenchError(
            f"optimum's graph ends at token states, which are pooled by mean; {source} wants {pooling.mode}"
        )
    script = Path(__file__).with_name("_optimum_script.py")
    task = "text-generation-with-past" if causal else "feature-extraction"
    finished = run(
        [os.environ[INTERPRETER], "-P", script, source.resolve(), out.resolve(), task],
        timeout_s=limits.BASELINE_TIMEOUT_S,
        env={key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")},
        max_output_bytes=limits.MAX_TOOL_OUTPUT_BYTES,
    )
    if not finished.ok:
        raise BenchError(finished.reason())
    copy_tokenizer(source, out)
    if causal:
        path = out / "genai_config.json"
        path.write_text(json.dumps(genai_config(config, source / "config.json"), indent=1), encoding="utf-8")


def notes(out: Path) -> tuple[str, ...]:
    """Which versions made it."""
    versions = optional_json(out / "optimum.json")
    return (", ".join(f"{name} {str(found)[:20]}" for name, found in sorted(versions.items())),) if versions else ()


def genai_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What onnxruntime-genai needs to know of a graph with optimum's names. Raises CheckpointError."""
    record = dict(config)
    heads, hidden = whole_number(record, "num_attention_heads", path), whole_number(record, "hidden_size", path)
    record = {"num_key_value_heads": heads, "head_dim": hidden // heads} | {
        key: value for key, value in record.items() if value is not None
    }
    ends = record.get("eos_token_id", 0)
    first = ends[0] if isinstance(ends, list) and ends else ends
    names = {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in ("key", "value")}
    decoder = {
        "filename": "model.onnx",
        "head_size": whole_number(record, "head_dim", path),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": whole_number(record, "num_hidden_layers", path),
        "num_key_value_heads": whole_number(record, "num_key_value_heads", path),
        "session_options": {"provider_options": []},
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")} | names,
        "outputs": {"logits": "logits"} | {f"present_{k}_names": f"present.%d.{k}" for k in ("key", "value")},
    }
    context = whole_number(record, "max_position_embeddings", path)
    model = {
        "type": "decoder",
        "context_length": context,
        "vocab_size": whole_number(record, "vocab_size", path),
        "bos_token_id": record.get("bos_token_id", first),
        "eos_token_id": ends,
        "pad_token_id": record.get("pad_token_id", first),
        "decoder": decoder,
    }
    return {"model": model, "search": {"max_length": context, "past_present_share_buffer": False}}
