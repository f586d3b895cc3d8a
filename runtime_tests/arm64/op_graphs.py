"""Small graphs, one per operator and type that the exporters write, each with inputs that exercise it.

Weights are random: parity of kernels needs no trained ones. Widths are multiples of 128, so that every block size
fits; `refused` graphs are ones that no onnxruntime may run, kept here so that a release that starts to is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_CONTRIB = "com.microsoft"
_TOKENS = 5
_WIDTH = 256
_HEADS = 4


@dataclass(frozen=True)
class OpGraph:
    """A one-operator model and its inputs. quantised: whether `accuracy_level` matters; refused: nothing may run it."""

    name: str
    model: onnx.ModelProto
    inputs: dict[str, np.ndarray]
    quantised: bool = False
    refused: bool = False


def _model(
    name: str, nodes: Sequence[onnx.NodeProto], inputs: dict[str, np.ndarray], constants: dict[str, np.ndarray]
) -> onnx.ModelProto:
    """A model that runs `nodes`; its outputs are all names that no node reads."""
    read = {entry for node in nodes for entry in node.input}
    outputs = [entry for node in nodes for entry in node.output if entry and entry not in read]
    graph = helper.make_graph(
        list(nodes),
        name,
        [helper.make_tensor_value_info(key, _elem(value), value.shape) for key, value in inputs.items()],
        [helper.make_tensor_value_info(entry, TensorProto.FLOAT, None) for entry in outputs],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _elem(array: np.ndarray) -> int:
    """ONNX element type of an array."""
    return helper.np_dtype_to_tensor_dtype(array.dtype)


def _floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Standard normal float32."""
    return rng.standard_normal(shape).astype(np.float32)


def _scales(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Positive float16 scales around 0.01: what the exporters store."""
    return (0.005 + 0.01 * rng.random(shape)).astype(np.float16)


def _contrib(kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, list(inputs), list(outputs), domain=_CONTRIB, **attributes)


def _matmul_nbits(bits: int, block: int, rows: int, zero_points: bool) -> OpGraph:
    """x [rows, K] · W [N, K] → [rows, N]; rows 1 is the decode kernel, more the prefill one."""
    rng = np.random.default_rng([bits, block, rows])
    width, out = 2 * _WIDTH, 96
    blocks = width // block
    inputs = {"x": _floats(rng, rows, width)}
    constants = {
        "codes": rng.integers(0, 256, (out, blocks, block * bits // 8), dtype=np.uint8),
        "scales16": _scales(rng, out * blocks),
    }
    if zero_points:
        constants["zeros"] = rng.integers(0, 256, out * ((blocks * bits + 7) // 8), dtype=np.uint8)
    nodes = [
        helper.make_node("Cast", ["scales16"], ["scales"], to=TensorProto.FLOAT),
        _contrib(
            "MatMulNBits",
            ["x", "codes", "scales", *(["zeros"] if zero_points else [])],
            ["y"],
            K=width,
            N=out,
            bits=bits,
            block_size=block,
            accuracy_level=4,
        ),
    ]
    name = f"MatMulNBits-{bits}bit-block{block}-{rows}rows{'-zeros' if zero_points else ''}"
    refused = bits not in {2, 4, 8}
    return OpGraph(name, _model(name, nodes, inputs, constants), inputs, quantised=True, refused=refused)


def _gather(bits: int, dtype: np.dtype[Any], block: int, zero_points: bool = False, refused: bool = False) -> OpGraph:
    """Rows of a quantised table [V, W] by token id, fp16 scales cast to float32."""
    rng = np.random.default_rng([bits, block])
    vocabulary, packed = 32, dtype == np.uint8 and bits < 8
    unsigned, native = dtype.name.startswith("u"), dtype.itemsize == 1 and not packed
    low, high = (0, 256) if packed else ((0, 2**bits) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1)))
    ints = np.int16 if native else np.uint8
    shape = (vocabulary, _WIDTH * bits // 8 if packed else _WIDTH)
    inputs = {"ids": rng.integers(0, vocabulary, (2, _TOKENS))}
    constants = {
        "codes": rng.integers(low, high, shape, dtype=ints).astype(dtype),
        "scales16": _scales(rng, vocabulary, _WIDTH // block),
    }
    if zero_points:
        columns = _WIDTH // block
        columns = columns * bits // 8 if packed else columns
        constants["zeros"] = rng.integers(low, high, (vocabulary, columns), dtype=ints).astype(dtype)
    nodes = [
        helper.make_node("Cast", ["scales16"], ["scales"], to=TensorProto.FLOAT),
        _contrib(
            "GatherBlockQuantized",
            ["codes", "ids", "scales", *(["zeros"] if zero_points else [])],
            ["y"],
            gather_axis=0,
            quantize_axis=1,
            block_size=block,
            bits=bits,
        ),
    ]
    name = f"GatherBlockQuantized-{bits}bit-{dtype.name}-block{block}{'-zeros' if zero_points else ''}"
    return OpGraph(name, _model(name, nodes, inputs, constants), inputs, refused=refused)


def _norms() -> Iterator[OpGraph]:
    """The four normalisations that fusion leaves behind, and the fused activations."""
    rng = np.random.default_rng(3)
    hidden, skip = _floats(rng, 2, _TOKENS, _WIDTH), _floats(rng, 2, _TOKENS, _WIDTH)
    constants = {name: _floats(rng, _WIDTH) for name in ("gamma", "beta", "bias")}
    both, one = {"x": hidden, "skip": skip}, {"x": hidden}
    gamma, bias = {"gamma": constants["gamma"]}, {"bias": constants["bias"]}
    epsilon = 1e-5
    node = _contrib(
        "SkipLayerNormalization", ["x", "skip", "gamma", "beta", "bias"], ["y", "", "", "sum"], epsilon=epsilon
    )
    yield OpGraph("SkipLayerNormalization", _model("sln", [node], both, constants), both)
    node = _contrib("SkipSimplifiedLayerNormalization", ["x", "skip", "gamma"], ["y", "", "", "sum"], epsilon=epsilon)
    yield OpGraph("SkipSimplifiedLayerNormalization", _model("ssln", [node], both, gamma), both)
    node = helper.make_node("SimplifiedLayerNormalization", ["x", "gamma"], ["y"], epsilon=epsilon, axis=-1)
    yield OpGraph("SimplifiedLayerNormalization", _model("rms", [node], one, gamma), one)
    for kind, extra in (("Gelu", {}), ("FastGelu", bias), ("BiasGelu", bias), ("QuickGelu", {})):
        node = _contrib(kind, ["x", *extra], ["y"])
        yield OpGraph(kind, _model(kind, [node], one, extra), one)


def _attentions() -> Iterator[OpGraph]:
    """MultiHeadAttention as BERT uses it, GroupQueryAttention as the decoder builder writes it, RotaryEmbedding."""
    rng = np.random.default_rng(4)
    lengths = np.array([_TOKENS, _TOKENS - 2])
    hidden = {name: _floats(rng, 2, _TOKENS, _WIDTH) for name in "qkv"}
    padded = np.arange(_TOKENS) >= lengths[:, None]
    bias = np.where(padded, -1e4, 0.0).astype(np.float32)[:, None, None, :].repeat(_TOKENS, axis=2)
    inputs = {**hidden, "bias": bias}
    node = _contrib("MultiHeadAttention", ["q", "k", "v", "", "", "bias"], ["y"], num_heads=_HEADS)
    yield OpGraph("MultiHeadAttention-bias", _model("mha", [node], inputs, {}), inputs)
    inputs = {**hidden, "mask": (~padded).astype(np.int32)}
    node = _contrib("MultiHeadAttention", ["q", "k", "v", "", "mask"], ["y"], num_heads=_HEADS)
    yield OpGraph("MultiHeadAttention-mask", _model("mha", [node], inputs, {}), inputs)
    for head, rotary, past in ((16, 1, 0), (16, 1, 3), (8, 0, 0), (8, 0, 3), (64, 1, 3), (64, 0, 0)):
        yield _group_query(head, rotary, past)
    for head in (8, 64):
        positions = np.tile(np.arange(_TOKENS), (2, 1))
        inputs = {"x": _floats(rng, 2, _TOKENS, _HEADS * head), "positions": positions}
        node = _contrib("RotaryEmbedding", ["x", "positions", "cos", "sin"], ["y"])
        yield OpGraph(f"RotaryEmbedding-head{head}", _model("rope", [node], inputs, _rotary_table(head)), inputs)


def _rotary_table(head: int) -> dict[str, np.ndarray]:
    """cos and sin [64 positions, head / 2]."""
    angles = np.outer(np.arange(64), 10_000.0 ** (-np.arange(head // 2) / (head / 2)))
    return {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}


def _group_query(head: int, rotary: int, past: int) -> OpGraph:
    """Four query heads on two key heads: a prefill (past 0) or one decode step after `past` tokens."""
    rng = np.random.default_rng([head, rotary, past])
    tokens, key_heads = (1 if past else _TOKENS), _HEADS // 2
    inputs = {
        "q": _floats(rng, 1, tokens, _HEADS * head),
        "k": _floats(rng, 1, tokens, key_heads * head),
        "v": _floats(rng, 1, tokens, key_heads * head),
        "past_k": _floats(rng, 1, key_heads, past, head),
        "past_v": _floats(rng, 1, key_heads, past, head),
        "last": np.array([past + tokens - 1], dtype=np.int32),
        "total": np.array(past + tokens, dtype=np.int32),
    }
    names = [*inputs, *(["cos", "sin"] if rotary else [])]
    attributes = {"num_heads": _HEADS, "kv_num_heads": key_heads, "do_rotary": rotary}
    node = _contrib("GroupQueryAttention", names, ["y", "present_k", "present_v"], **attributes)
    name = f"GroupQueryAttention-head{head}-rotary{rotary}-past{past}"
    return OpGraph(name, _model("gqa", [node], inputs, _rotary_table(head) if rotary else {}), inputs)


def op_graphs() -> list[OpGraph]:
    """Every graph, smallest differences first in the name: operator, bits, type, block."""
    graphs = [
        _matmul_nbits(bits, block, rows, False) for bits in (2, 4, 8) for block in (32, 64, 128) for rows in (1, 7)
    ]
    graphs += [_matmul_nbits(bits, 32, rows, True) for bits in (2, 4, 8) for rows in (1, 7)]
    graphs.append(_matmul_nbits(3, 32, 7, False))
    uint8, int8 = np.dtype(np.uint8), np.dtype(np.int8)
    int4, uint4 = np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4)
    for block in (32, 64, 128):
        graphs += [_gather(2, uint8, block), _gather(4, uint8, block), _gather(8, uint8, block)]
        graphs += [_gather(4, int4, block), _gather(4, uint4, block)]
    graphs += [_gather(4, uint8, 32, True), _gather(8, uint8, 32, True), _gather(4, int4, 32, True)]
    graphs.append(_gather(8, int8, 32, refused=True))
    return [*graphs, *_norms(), *_attentions()]
