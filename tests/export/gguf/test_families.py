"""Every family that edgec writes to GGUF, with random weights: llama.cpp's logits against torch's.

Weights are stored as F32 here, so what is left is llama.cpp's half-precision KV cache: a wrong permutation, scale or
key in the metadata is a thousand times larger.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoder_cases import FAMILIES, LLAMA3, VARIANTS, YARN, make_config, make_model, save

from edgec import modeling
from edgec.checkpoint import open_checkpoint
from edgec.errors import UnsupportedModelError
from edgec.export.gguf import stock
from edgec.export.gguf.writer import write_gguf
from edgec.fit import fit
from edgec.quantize.formats import CoreFormat
from edgec.records import Spec
from edgec.runtime.llama_cpp import LlamaCpp

pytest.importorskip("llama_cpp", reason="needs the extra edgec[gguf]")

IDS = np.random.default_rng(0).integers(3, 270, 48)

WRITTEN = ("llama", "smollm", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
MORE = (
    "llama, head_dim 8",
    "llama, head_dim 24",
    "llama, biases",
    "llama, llama3 scaling",
    "llama, yarn scaling",
    "gemma3, two rope scalings",
)
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


def written(source: Path, out: Path) -> LlamaCpp:
    """The checkpoint as a GGUF of floats, every planned matrix given as a core, opened in llama.cpp."""
    checkpoint = open_checkpoint(source)
    draft = stock.draft(checkpoint)
    layers = modeling.layers(modeling.without_memory(checkpoint))
    state = modeling.load_dense(checkpoint).state_dict()
    cores: dict[str, Any] = {
        layer.name: next(
            iter(
                fit(
                    state[f"{layer.name}.weight"].numpy(), Spec("dense"), CoreFormat(32), role=layer.role
                ).cores.values()
            )
        )
        for layer in layers
    }
    for layer in layers:
        if layer.tied_to:
            cores[layer.name] = cores[layer.tied_to]
    out.mkdir()
    write_gguf(out / "model.gguf", draft.metadata, stock.tensors(draft, cores))
    return LlamaCpp(out)


def difference(loaded: LlamaCpp, source: Path, ids: Any) -> float:
    model = modeling.load_dense(open_checkpoint(source))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return float(np.linalg.norm(loaded.logits(ids) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", [*WRITTEN, *MORE])
def test_llama_cpp_computes_what_torch_does(name: str, tmp_path: Path) -> None:
    changes = {"query_pre_attn_scalar": 16} if name.startswith("gemma3") else {}
    source = save(tmp_path / "source", make_model(make_config(name, **changes)), tokenizer=False)
    assert difference(written(source, tmp_path / "out"), source, IDS) < 2e-3


@pytest.mark.parametrize(
    ("name", "rope"),
    [("qwen2", YARN), ("llama", LINEAR), ("gemma", LINEAR), ("qwen3", LINEAR)],
)
def test_rotary_scaling_is_read_in_other_families_too(name: str, rope: dict[str, Any], tmp_path: Path) -> None:
    source = save(tmp_path / "source", make_model(make_config(name, rope_parameters=rope)), tokenizer=False)
    assert difference(written(source, tmp_path / "out"), source, IDS) < 2e-3


@pytest.mark.parametrize("name", ["mistral, window", "qwen2, window in the second layer"])
def test_a_window_that_llama_cpp_ignores_ends_the_context(name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", make_model(make_config(name)), tokenizer=False)
    loaded = written(source, tmp_path / "out")
    assert loaded.context_length == 7
    assert difference(loaded, source, IDS[:7]) < 2e-3


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("phi3", {}, "edgec writes GGUF files of llama, mistral"),
        ("smollm3", {}, "edgec writes GGUF files of"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar 99"),
        ("gemma", {"tie_word_embeddings": False}, "an untied head"),
        ("qwen3", {"rope_parameters": LLAMA3}, "llama3 rotary scaling"),
        ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.5}}, "yarn with attention_factor"),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    name: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    source = save(tmp_path / "source", make_model(make_config(name, **changes)), tokenizer=False)
    checkpoint = open_checkpoint(source)
    with pytest.raises(UnsupportedModelError, match=reason):
        stock.refuse_unsupported(checkpoint, modeling.task_of(checkpoint))


def test_every_family_is_written_or_refused_on_purpose() -> None:
    assert set(WRITTEN) | {"phi3", "smollm3"} == set(FAMILIES)
    assert set(MORE) < set(VARIANTS)
