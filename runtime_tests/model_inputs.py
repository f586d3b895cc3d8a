"""Inputs for an exported model, made from the signature in the file: nothing is assumed about the architecture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

_PAST = "past_key_values."
_PRESENT = "present."


def vocabulary_size(artifact: Path) -> int:
    """How many token ids an artifact folder's config knows."""
    config = artifact / "config.json"
    if config.exists():
        return int(json.loads(config.read_text(encoding="utf-8"))["vocab_size"])
    genai = json.loads((artifact / "genai_config.json").read_text(encoding="utf-8"))
    return int(genai["model"]["vocab_size"])


def encoder_inputs(model: Path, ids: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """ids [batch, tokens], of which the first lengths [batch] of each row count; the rest is padding."""
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    known = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {entry.name: known[entry.name].astype(_dtype(entry)) for entry in _signature(model)}


def decoder_inputs(
    model: Path, ids: np.ndarray, previous: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Inputs that run ids [batch, tokens] after what `previous` outputs (`present.N.key`, ...) hold; None: a start.

    Past keys and values are [batch, key heads, past tokens, head size]; at the start they have 0 past tokens.
    """
    signature = _signature(model)
    present = {name.replace(_PRESENT, _PAST): value for name, value in (previous or {}).items()}
    past = next((value.shape[2] for name, value in present.items() if name.startswith(_PAST)), 0)
    batch, tokens = ids.shape
    positions = np.broadcast_to(np.arange(past, past + tokens), (batch, tokens))
    mask = np.ones((batch, past + tokens))
    known = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **present}
    for entry in signature:
        if entry.name.startswith(_PAST) and not present:
            _, heads, _, size = (dim.dim_value for dim in entry.type.tensor_type.shape.dim)
            known[entry.name] = np.zeros((batch, heads, 0, size or _head_size(model.parent)))
    return {entry.name: known[entry.name].astype(_dtype(entry)) for entry in signature}


def _head_size(artifact: Path) -> int:
    """From the config: onnxruntime-genai's builder leaves this dimension of the cache without a number."""
    genai = json.loads((artifact / "genai_config.json").read_text(encoding="utf-8"))
    return int(genai["model"]["decoder"]["head_size"])


def _signature(model: Path) -> list[onnx.ValueInfoProto]:
    """The graph's inputs, without those that are only names of initialisers."""
    graph = onnx.load(model, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [entry for entry in graph.input if entry.name not in constants]


def _dtype(entry: onnx.ValueInfoProto) -> np.dtype[np.generic]:
    return helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)
