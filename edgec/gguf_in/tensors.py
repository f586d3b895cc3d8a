"""model.safetensors of a GGUF: the same numbers under transformers' names, streamed one tensor at a time.

llama.cpp's converter changes two things on the way in, both undone here: the rows of Llama's query and key matrices
are interleaved (it rotates neighbours, transformers rotates halves), and Gemma's norms hold 1 + w.
Q8_0 becomes F32: scale [fp16] × code [int8] needs 19 bits, which fp16 and bf16 lack.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edgec.errors import CheckpointError, UnsupportedModelError
from edgec.gguf_header import BLOCKS, GgufHeader, GgufTensor, tensor_bytes

_STORED: Mapping[str, Any] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""Gemma 2 and 3 have a norm before and one after each half of a block."""
_IGNORED = {"rope_freqs.weight"}
"""A table of the configuration, not a weight."""

_BLOCK = re.compile(r"blk\.(\d{1,5})\.([a-z_]+)\.(weight|bias)")
_, _Q8_BLOCK, _Q8_BYTES = BLOCKS[8]
_CHUNK_ROWS = 1 << 22


def safetensors_bytes(header: GgufHeader) -> int:
    """What `write_safetensors` will write [bytes], its header aside. Raises CheckpointError for types it refuses."""
    return sum(_dtype(header, info).itemsize * info.elements for info in header.tensors.values())


def write_safetensors(header: GgufHeader, config: Mapping[str, Any], out: Path) -> None:
    """config: as `config_of` gave it. Raises UnsupportedModelError naming a tensor that has no place."""
    names = {name: hf_name(name, header.architecture, header.path) for name in header.tensors if name not in _IGNORED}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, place in names.items():
        info = header.tensors[name]
        dtype = _dtype(header, info)
        size = dtype.itemsize * info.elements
        label = {"<f4": "F32", "<f2": "F16"}.get(dtype.str, "BF16")
        entries[place] = {"dtype": label, "shape": list(info.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with out.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            values = np.ascontiguousarray(_restored(header, name, config))
            file.write(values.reshape(-1).view(np.uint8).data)


def hf_name(name: str, architecture: str, where: Path) -> str:
    """`blk.0.attn_q.weight` → `model.layers.0.self_attn.q_proj.weight`. Raises UnsupportedModelError."""
    stem, _, kind = name.rpartition(".")
    if stem in _OUTSIDE and kind == "weight":
        return f"{_OUTSIDE[stem]}.weight"
    match = _BLOCK.fullmatch(name)
    known = _IN_BLOCK | _FOUR_NORMS if architecture in ("gemma2", "gemma3") else _IN_BLOCK
    if match is None or match[2] not in known:
        raise UnsupportedModelError(f"{where}: tensor {name!r} has no place in a {architecture} of transformers")
    return f"model.layers.{int(match[1])}.{known[match[2]]}.{match[3]}"


def _restored(header: GgufHeader, name: str, config: Mapping[str, Any]) -> NDArray[Any]:
    values = _values(header, name)
    match = _BLOCK.fullmatch(name)
    if header.architecture == "llama" and match and match[2] in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if match[2] == "attn_q" else "num_key_value_heads"]
        rows = values.shape[0]
        if rows != heads * config["head_dim"] or config["head_dim"] % 2:
            raise CheckpointError(
                f"{header.path}: tensor {name!r} is {list(values.shape)}, expected {heads} heads of "
                f"{config['head_dim']} rows, an even number"
            )
        pairs = np.arange(rows).reshape(heads, rows // heads // 2, 2)
        return values[pairs.transpose(0, 2, 1).reshape(-1)]
    if header.architecture.startswith("gemma") and name.endswith("norm.weight"):
        return (values.astype(np.float32) - 1.0).astype(values.dtype)
    return values


def _dtype(header: GgufHeader, info: GgufTensor) -> Any:
    if info.type_name == "Q8_0":
        return np.dtype("<f4")
    if info.type_name not in _STORED:
        raise CheckpointError(
            f"{header.path}: tensor {info.name!r} is {info.type_name}, already quantised; edgec reads F32, F16, BF16 "
            "and Q8_0. Give the file or folder it was quantised from"
        )
    return _STORED[info.type_name]


def _values(header: GgufHeader, name: str) -> NDArray[Any]:
    info = header.tensors[name]
    raw = tensor_bytes(header, name)
    if info.type_name != "Q8_0":
        values: NDArray[Any] = raw.view(_STORED[info.type_name]).reshape(info.shape)
        return values
    blocks = raw.reshape(-1, _Q8_BYTES)
    out = np.empty((len(blocks), _Q8_BLOCK), np.float32)
    for start in range(0, len(blocks), _CHUNK_ROWS):
        part = blocks[start : start + _CHUNK_ROWS]
        scales = np.ascontiguousarray(part[:, :2]).view("<f2").astype(np.float32)
        np.multiply(part[:, 2:].view(np.int8), scales, out=out[start : start + len(part)])
    return out.reshape(info.shape)
