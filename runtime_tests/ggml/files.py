"""GGUF files of a real shape with random blocks, made as fast as the disk writes: for speed, never for quality."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.bench.shapes import SHAPES, Shape
from edgec.contraction import MatMul, core_shapes
from edgec.export.gguf.writer import GgufTensor, write_gguf
from edgec.fit import contraction_of
from edgec.plan.candidates import uniform
from edgec.quantize.ggml_formats import row_bytes
from edgec.runtime.ggml.bundles import file_order
from edgec.runtime.ggml.program import FORMAT, PROGRAMS_KEY, ROTATION_KEY, Program, encode
from edgec.runtime.layout import FORMAT_KEY

SIZES = {"tiny": "llama-tiny", "300m": "llama-300m", "1b": "llama-3.2-1b"}
_BLOCK = 32
BLOCK_BYTES = {kind: row_bytes(kind, _BLOCK) for kind in ("Q4_0", "Q8_0")}
_STD = 0.02


@dataclass(frozen=True)
class Made:
    """A file. read_bytes: of the weights that one decoded token is multiplied with."""

    path: Path
    file_bytes: int
    read_bytes: int


def write(size: str, kind: str, path: Path, ratio: float | None = None) -> Made:
    """A Llama with a tied head, all matrices of one type; with a ratio, block linears and head as pairs of cores."""
    shape = SHAPES[SIZES[size]]
    metadata: dict[str, Any] = _metadata(shape)
    matrices = dict(_linears(shape))
    tensors = [_vector(name, shape.hidden) for name in _norms(shape)]
    tensors.append(_matrix("token_embd.weight", (shape.vocab, shape.hidden), kind))
    if ratio is None:
        products = [_matrix(f"{name}.weight", dims, kind) for name, dims in matrices.items()]
        read = sum(t.nbytes for t in [*products, tensors[-1]])
    else:
        products, programs = [], {}
        for name, dims in {**matrices, "output": (shape.vocab, shape.hidden)}.items():
            contraction = contraction_of(uniform(dims, ratio, _BLOCK), dims, "linear")
            assert all(isinstance(step, MatMul) for step in contraction.steps)
            cores = core_shapes(contraction)
            products += [_matrix(f"{name}.edgec.{core}", s, kind) for core, s in cores.items()]  # type: ignore[arg-type]
            programs[name] = Program(contraction, {core: f"{name}.edgec.{core}" for core in cores})
        by_name = {tensor.name: tensor for tensor in products}
        products = [by_name[name] for name in file_order(list(by_name), programs)]
        metadata |= {FORMAT_KEY: FORMAT, ROTATION_KEY: "halves", PROGRAMS_KEY: encode(programs)}
        read = sum(t.nbytes for t in products)
    write_gguf(path, metadata, [*tensors, *products])
    return Made(path, path.stat().st_size, read)


def _metadata(shape: Shape) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "general.quantization_version": 2,
        "llama.block_count": shape.layers,
        "llama.context_length": shape.positions,
        "llama.embedding_length": shape.hidden,
        "llama.feed_forward_length": shape.ffn,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.key_length": shape.head_dim,
        "llama.attention.value_length": shape.head_dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": shape.head_dim,
        "llama.rope.freq_base": shape.rope_theta,
        "llama.vocab_size": shape.vocab,
        "tokenizer.ggml.model": "no_vocab",
    }


def _linears(shape: Shape) -> Iterator[tuple[str, tuple[int, int]]]:
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for i in range(shape.layers):
        yield f"blk.{i}.attn_q", (query, shape.hidden)
        yield f"blk.{i}.attn_k", (key, shape.hidden)
        yield f"blk.{i}.attn_v", (key, shape.hidden)
        yield f"blk.{i}.attn_output", (shape.hidden, query)
        yield f"blk.{i}.ffn_gate", (shape.ffn, shape.hidden)
        yield f"blk.{i}.ffn_up", (shape.ffn, shape.hidden)
        yield f"blk.{i}.ffn_down", (shape.hidden, shape.ffn)


def _norms(shape: Shape) -> Iterator[str]:
    for i in range(shape.layers):
        yield f"blk.{i}.attn_norm.weight"
        yield f"blk.{i}.ffn_norm.weight"
    yield "output_norm.weight"


def _vector(name: str, size: int) -> GgufTensor:
    return GgufTensor(name, (size,), "F32", lambda: np.ones(size, np.float32))


def _matrix(name: str, dims: tuple[int, int], kind: str) -> GgufTensor:
    def data() -> NDArray[np.uint8]:
        rows, columns = dims
        generator = np.random.Generator(np.random.SFC64([0, zlib.crc32(name.encode())]))
        count = rows * columns // _BLOCK
        raw = np.frombuffer(generator.bytes(count * BLOCK_BYTES[kind]), np.uint8).reshape(count, -1).copy()
        deviation = 4.6 if kind == "Q4_0" else 74.0  # of uniformly random codes
        raw[:, :2] = np.frombuffer(np.float16(_STD / deviation).tobytes(), np.uint8)
        return raw.reshape(rows, -1)

    return GgufTensor(name, dims, kind, data)
