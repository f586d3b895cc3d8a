"""Bytes of a decode step, counted from files: what is multiplied, what is only looked up, what is cast."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgec.bench.reads import Reads, reads_of
from edgec.contraction import Contraction, Gather, MatMul
from edgec.errors import BenchError
from edgec.runtime.ggml.program import PROGRAMS_KEY, Program, encode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gguf_for_tests as g

WIDTH, VOCAB, HEADS, HEAD = 32, 100, 2, 16


def decoder(folder: Path, nodes: Sequence[Any], constants: dict[str, Any], *, head: int | str = "head_dim") -> Path:
    """A folder with a graph of these nodes and two cache inputs; nothing runs it."""
    past = [
        helper.make_tensor_value_info(f"past_key_values.0.{part}", TensorProto.FLOAT, ["batch", HEADS, "past", head])
        for part in ("key", "value")
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "decoder", [ids, *past], [y], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    folder.mkdir()
    onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(folder / "model.onnx"))
    config = {"model": {"decoder": {"filename": "model.onnx", "head_size": HEAD}}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder


def node(kind: str, inputs: Sequence[str], output: str = "y", domain: str = "", **attributes: Any) -> Any:
    return helper.make_node(kind, list(inputs), [output], domain=domain, **attributes)


TABLE = np.zeros((VOCAB, WIDTH), np.float32)
SQUARE = np.zeros((WIDTH, WIDTH), np.float32)
CACHE = 2 * HEADS * HEAD * 4


def test_a_table_that_is_looked_up_counts_one_row_and_a_matrix_whole(tmp_path: Path) -> None:
    nodes = [node("Gather", ["table", "input_ids"], "x"), node("MatMul", ["x", "w"])]
    found = reads_of(decoder(tmp_path / "m", nodes, {"table": TABLE, "w": SQUARE}))
    assert found == Reads(4 * WIDTH + 4 * WIDTH * WIDTH, CACHE)
    assert found.at(10) == found.weight_bytes + 10 * CACHE


def test_a_tied_table_counts_once_and_whole(tmp_path: Path) -> None:
    """As genai's builder writes it: the head's matrix, and a transposed view of it for the embedding."""
    nodes = [
        node("Transpose", ["head"], "table", perm=[1, 0]),
        node("Gather", ["table", "input_ids"], "x"),
        node("MatMul", ["x", "head"]),
    ]
    head = np.ascontiguousarray(TABLE.T)
    assert reads_of(decoder(tmp_path / "m", nodes, {"head": head})).weight_bytes == 4 * VOCAB * WIDTH


def test_constants_that_are_cast_count_as_they_are_kept(tmp_path: Path) -> None:
    nodes = [
        node("Cast", ["w"], "wide", to=TensorProto.FLOAT),
        node("Gather", ["table", "input_ids"], "x"),
        node("MatMul", ["x", "wide"]),
    ]
    constants = {"table": TABLE.astype(np.float16), "w": SQUARE.astype(np.float16)}
    assert reads_of(decoder(tmp_path / "m", nodes, constants)).weight_bytes == 2 * WIDTH + 4 * WIDTH * WIDTH


def test_a_shared_quantised_table_and_rotary_tables(tmp_path: Path) -> None:
    """Codes are the head's and, reshaped, the embedding's; the rotary tables give a row each."""
    codes, scales = np.zeros((VOCAB, 1, 16), np.uint8), np.zeros((VOCAB, 1), np.float32)
    cos = np.zeros((64, HEAD // 2), np.float32)
    nodes = [
        node("Reshape", ["codes", "shape"], "flat"),
        node("GatherBlockQuantized", ["flat", "input_ids", "scales"], "x", "com.microsoft"),
        node("GroupQueryAttention", ["x", "", "", *[f"past_key_values.0.{p}" for p in ("key", "value")], "", "", "cos",
                                     "sin"], "a", "com.microsoft"),
        node("MatMulNBits", ["a", "codes", "scales"], "y", "com.microsoft"),
    ]  # fmt: skip
    constants = {"codes": codes, "scales": scales, "cos": cos, "sin": cos, "shape": np.array([VOCAB, 16], np.int64)}
    found = reads_of(decoder(tmp_path / "m", nodes, constants))
    assert found.weight_bytes == codes.nbytes + scales.nbytes + 2 * cos[0].nbytes + 16  # the shape: two numbers


def test_what_cannot_be_known_is_said(tmp_path: Path) -> None:
    constants: dict[str, Any] = {"w": SQUARE}
    with pytest.raises(BenchError, match="QMoE"):
        reads_of(decoder(tmp_path / "experts", [node("QMoE", ["input_ids", "w"], domain="com.microsoft")], constants))
    nodes = [node("MatMul", ["input_ids", "w"])]
    folder = decoder(tmp_path / "unsized", nodes, constants)
    (folder / "genai_config.json").write_text('{"model": {"decoder": {"head_size": true}}}')
    with pytest.raises(BenchError, match="does not say its heads"):
        reads_of(folder)
    (folder / "model.onnx").write_bytes(b"\xff" * 99)
    with pytest.raises(BenchError, match="cannot be read as ONNX"):
        reads_of(folder)
    chain = [node("Identity", [f"w{i}" if i else "w"], f"w{i + 1}") for i in range(20)]
    with pytest.raises(BenchError, match="passes through more than"):
        reads_of(decoder(tmp_path / "chain", [*chain, node("MatMul", ["input_ids", "w20"])], constants))


def gguf(folder: Path, infos: dict[str, tuple[int, int]], programs: str = "", **more: Any) -> Path:
    """A folder with a model.gguf of F32 tensors (out, in), two layers, two key heads of 16."""
    told = {"block_count": 2, "embedding_length": WIDTH, "attention.head_count": 2, "attention.head_count_kv": HEADS}
    pairs = [g.pair("general.architecture", g.STRING, "llama")]
    for key, value in (told | more).items():
        pairs.append(
            g.array(f"llama.{key}", g.F32 if any(isinstance(n, float) for n in value) else g.U32, value)
            if isinstance(value, list)
            else g.pair(f"llama.{key}", g.U32, value)
        )
    pairs += [g.pair(PROGRAMS_KEY, g.STRING, programs)] if programs else []
    entries, offset = [], 0
    for name, (out, width) in infos.items():
        entries.append(g.info(name, (width, out), 0, offset))
        offset += 4 * out * width
    folder.mkdir()
    (folder / ("model.factored.gguf" if programs else "model.gguf")).write_bytes(g.gguf(pairs, entries, bytes(offset)))
    return folder


def test_a_gguf_with_a_head_of_its_own_and_a_tied_one(tmp_path: Path) -> None:
    table, layer = (VOCAB, WIDTH), (WIDTH, WIDTH)
    tied = reads_of(gguf(tmp_path / "tied", {"token_embd.weight": table, "blk.0.attn_q.weight": layer}))
    own = {"token_embd.weight": table, "output.weight": table, "blk.0.attn_q.weight": layer}
    untied = reads_of(gguf(tmp_path / "own", own))
    assert tied.weight_bytes == 4 * WIDTH * (VOCAB + WIDTH)
    assert untied.weight_bytes == 4 * WIDTH * (VOCAB + WIDTH) + 4 * WIDTH
    assert tied.cache_bytes == 2 * 2 * HEADS * HEAD * 2  # layers, keys and values, F16
    assert reads_of(tmp_path / "own", "q8_0").cache_bytes == 2 * 2 * HEADS * HEAD * 34 / 32


def test_a_factored_table_is_looked_up_in_its_first_core_only(tmp_path: Path) -> None:
    steps = (Gather("a", VOCAB, 8), MatMul("b", WIDTH, 8))
    program = Program(Contraction(WIDTH, VOCAB, steps), {"a": "token_embd.edgec.a", "b": "token_embd.edgec.b"})
    tensors = {"token_embd.edgec.a": (VOCAB, 8), "token_embd.edgec.b": (WIDTH, 8), "output.weight": (VOCAB, WIDTH)}
    found = reads_of(gguf(tmp_path / "m", tensors, encode({"token_embd": program})))
    assert found.weight_bytes == 4 * 8 + 4 * WIDTH * 8 + 4 * VOCAB * WIDTH


def test_experts_in_a_gguf(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="mixture of experts"):
        reads_of(gguf(tmp_path / "m", {"token_embd.weight": (VOCAB, WIDTH)}, expert_count=8))


@pytest.mark.parametrize("heads", [[], [2], [2, 2, 2], [2.0, float("nan")]])
def test_heads_that_are_no_counts_are_refused(heads: list[Any], tmp_path: Path) -> None:
    folder = gguf(tmp_path / "m", {"token_embd.weight": (VOCAB, WIDTH)}, **{"attention.head_count": heads})
    with pytest.raises(BenchError, match="count of heads for each of 2 layers"):
        reads_of(folder)
    with pytest.raises(BenchError):
        reads_of(gguf(tmp_path / "experts", {"token_embd.weight": (VOCAB, WIDTH)}, expert_count=[1, 2]))
