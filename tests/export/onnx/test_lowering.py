"""What the lowering does to a graph: the layer's node is replaced, nothing else is, and every step computes its part.

That lowered decompositions equal their torch form is in `tests/contracts/test_decompositions.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs_for_tests import LAYER, constant, linear_graph, model_of, run_graph, table_graph, value

from edgec.contraction import (
    BlockMatMul,
    Contraction,
    Gather,
    MatMul,
    ReduceSum,
    Reshape,
    Scale,
    Step,
    Sum,
    Transpose,
    core_shapes,
    evaluate,
)
from edgec.errors import ExportError
from edgec.export.onnx.graph import DenseGraph
from edgec.export.onnx.lowering import lower
from edgec.fit import Factors, fit
from edgec.quantize import rtn
from edgec.quantize.formats import CoreFormat
from edgec.records import Spec

FP32, INT4 = CoreFormat(32), CoreFormat.parse("int4-b32")

STEPS: dict[str, tuple[Step, ...]] = {
    "reshape and transpose": (Reshape((2, 2, 3)), Transpose((2, 0, 1)), Reshape((12,)), MatMul("w", 6, 12)),
    "matmul on the last of three": (Reshape((2, 2, 3)), MatMul("w", 5, 3), Reshape((20,)), MatMul("v", 6, 20)),
    "blocks": (BlockMatMul("turn", 4, 3), MatMul("w", 6, 12)),
    "scale": (Scale("s", 12), MatMul("w", 6, 12)),
    "scale on the last of two": (Reshape((3, 4)), Scale("s", 4), Reshape((12,)), MatMul("w", 6, 12)),
    "reduce the first": (Reshape((3, 4)), ReduceSum(0), MatMul("w", 6, 4)),
    "reduce the last": (Reshape((3, 4)), ReduceSum(1), MatMul("w", 6, 3)),
    "sum": (Sum(((MatMul("w", 6, 12),), (MatMul("b", 2, 12), Scale("s", 2), MatMul("a", 6, 2)))),),
    "nested sum": (Sum(((Sum(((MatMul("w", 6, 12),), (MatMul("v", 6, 12),))),), (MatMul("u", 6, 12),))),),
}


def weight(out: int = 6, in_: int = 12, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((out, in_)).astype(np.float32)


def factors_of(contraction: Contraction, dtype: Any = np.float32) -> Factors:
    generator = np.random.default_rng(1)
    return Factors(
        contraction,
        {name: generator.standard_normal(shape).astype(dtype) for name, shape in core_shapes(contraction).items()},
    )


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_step_computes_what_the_reference_does(name: str, dtype: Any, tmp_path: Path) -> None:
    factors = factors_of(Contraction(6, 12, STEPS[name]), dtype)
    graph = linear_graph(weight())
    lower(graph, {LAYER: factors}, accuracy_level=0)
    x = np.random.default_rng(2).standard_normal((2, 5, 12)).astype(np.float32)
    expected = evaluate(factors.contraction, factors.values(), x)
    np.testing.assert_allclose(run_graph(graph.model, tmp_path, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["low rank", "backbone and correction"])
def test_lookups_are_programs_too(kind: str, tmp_path: Path) -> None:
    low: tuple[Step, ...] = (Gather("u", 50, 3), MatMul("v", 8, 3))
    steps = low if kind == "low rank" else (Sum(((Gather("t", 50, 8),), low)),)
    factors = factors_of(Contraction(8, 50, steps))
    graph = table_graph(weight(50, 8))
    lower(graph, {LAYER: factors}, accuracy_level=0)
    ids = np.array([[0, 49, 3], [3, 3, 7]])
    expected = evaluate(factors.contraction, factors.values(), ids)
    np.testing.assert_allclose(run_graph(graph.model, tmp_path, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fmt", ["int2-b32", "int4-b32", "int8-b32"])
def test_a_large_table_s_scales_stay_in_the_file(fmt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Cast stands before them, which onnxruntime would compute at load and hold as fp32."""
    factors = fit(weight(50, 64), Spec("dense"), CoreFormat.parse(fmt), role="embedding")
    ids = np.array([[0, 49, 3], [3, 3, 7]])
    expected = factors.dense()[ids]
    for fewest, order in ((101, ["Cast", "GatherBlockQuantized"]), (100, ["GatherBlockQuantized", "Cast"])):
        monkeypatch.setattr("edgec.export.onnx.lowering._LARGE_TABLE", fewest)
        graph = table_graph(weight(50, 64))
        lower(graph, {LAYER: factors}, accuracy_level=0)
        assert ops(graph.model) == order
        found = run_graph(graph.model, tmp_path / str(fewest), ids)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0 if order[0] == "Cast" else 2**-11, atol=1e-7)


def test_batch_and_sequence_stay_dynamic(tmp_path: Path) -> None:
    graph = linear_graph(weight(64, 48))
    spec = Spec("tensor_train", (8, 4), ((64, 1), (1, 6), (1, 8)))
    factors = fit(weight(64, 48), spec, FP32)
    lower(graph, {LAYER: factors}, accuracy_level=0)
    for shape in [(1, 1), (3, 7), (0, 4)]:
        x = np.random.default_rng(0).standard_normal((*shape, 48)).astype(np.float32)
        found = run_graph(graph.model, tmp_path, x)
        np.testing.assert_allclose(found, evaluate(factors.contraction, factors.values(), x), atol=1e-4)


def test_only_the_layer_is_replaced(tmp_path: Path) -> None:
    bias = np.arange(64, dtype=np.float32)
    graph = linear_graph(weight(64, 96), bias)
    lower(graph, {LAYER: fit(weight(64, 96), Spec("svd", (32,)), INT4)}, accuracy_level=4)
    assert [op for op in ops(graph.model) if op != "Cast"] == ["MatMulNBits", "MatMulNBits", "Add"]
    assert set(graph.model.graph.initializers) == {
        f"{LAYER}/core2.codes",
        f"{LAYER}/core2.scales",
        f"{LAYER}/core1.codes",
        f"{LAYER}/core1.scales",
        "bias",
    }
    assert graph.model.opset_imports["com.microsoft"] == 1
    attributes = next(n for n in graph.model.graph if n.op_type == "MatMulNBits").attributes
    found = {name: attribute.value for name, attribute in attributes.items()}
    assert found == {"K": 96, "N": 32, "bits": 4, "block_size": 32, "accuracy_level": 4}
    x = np.random.default_rng(0).standard_normal((1, 2, 96)).astype(np.float32)
    assert run_graph(graph.model, tmp_path, x).shape == (1, 2, 64)


def test_an_output_of_the_graph_keeps_its_name() -> None:
    graph = linear_graph(weight())
    lower(graph, {LAYER: fit(weight(), Spec("dense"), FP32)}, accuracy_level=0)
    assert [v.name for v in graph.model.graph.outputs] == ["y"]
    names = [v.name for node in graph.model.graph for v in node.outputs]
    assert len(set(names)) == len(names)


def two_readers(shared: bool) -> DenseGraph:
    """x Wᵀ twice, added: from one initializer or from two."""
    x = value("x", ir.DataType.FLOAT, ["B", "T", 12])
    weights = [constant("w0", np.ascontiguousarray(weight().T))]
    if not shared:
        weights.append(constant("w1", np.ascontiguousarray(weight(seed=1).T)))
    nodes = [ir.node("MatMul", [x, weights[0]], name="a"), ir.node("MatMul", [x, weights[-1]], name="b")]
    for node in nodes:
        node.outputs[0].name, node.outputs[0].dtype = f"{node.name}_out", ir.DataType.FLOAT
        node.outputs[0].shape = ir.Shape(["B", "T", 6])
    total = ir.node("Add", [node.outputs[0] for node in nodes])
    total.outputs[0].name, total.outputs[0].dtype = "y", ir.DataType.FLOAT
    total.outputs[0].shape = ir.Shape(["B", "T", 6])
    model = model_of([x], [*nodes, total], total.outputs[0], weights)
    return DenseGraph(model, {"a": nodes[0], "b": nodes[1]}, {})


def test_a_weight_that_another_node_reads_stays() -> None:
    graph = two_readers(shared=True)
    lower(graph, {"a": fit(weight(), Spec("svd", (2,)), FP32)}, accuracy_level=0)
    assert "w0" in graph.model.graph.initializers
    graph = two_readers(shared=False)
    lower(graph, {"a": fit(weight(), Spec("svd", (2,)), FP32)}, accuracy_level=0)
    assert "w0" not in graph.model.graph.initializers
    assert "w1" in graph.model.graph.initializers


def test_layers_that_share_their_cores_share_their_bytes(tmp_path: Path) -> None:
    """A tied head and table, dense: one array, whatever its format."""
    table = weight(40, 64)
    for fmt in ("fp32", "fp16", "int8-b32", "int4-b32"):
        lookup = fit(table, Spec("dense"), CoreFormat.parse(fmt), role="embedding")
        head = Factors(Contraction(40, 64, (MatMul("weight", 40, 64),)), dict(lookup.cores))
        ids = value("x", ir.DataType.INT64, ["B", "T"])
        held, turned = constant("table", table), constant("turned", np.ascontiguousarray(table.T))
        rows = ir.node("Gather", [held, ids], name="lookup")
        rows.outputs[0].name, rows.outputs[0].dtype = "rows", ir.DataType.FLOAT
        rows.outputs[0].shape = ir.Shape(["B", "T", 64])
        logits = ir.node("MatMul", [rows.outputs[0], turned], name="head")
        logits.outputs[0].name, logits.outputs[0].dtype = "y", ir.DataType.FLOAT
        logits.outputs[0].shape = ir.Shape(["B", "T", 40])
        model = model_of([ids], [rows, logits], logits.outputs[0], [held, turned])
        graph = DenseGraph(model, {"head": logits}, {"table": rows})
        lower(graph, {"head": head, "table": lookup}, accuracy_level=0)
        folder = tmp_path / fmt
        x = np.array([[1, 39]])
        dense = lookup.dense()
        np.testing.assert_allclose(run_graph(graph.model, folder, x), dense[x] @ dense.T, rtol=1e-3, atol=1e-3)
        data = (folder / "model.onnx.data").stat().st_size
        assert data <= lookup.stored_bytes + 128


def test_a_layer_that_the_graph_lacks_is_named() -> None:
    with pytest.raises(ExportError, match="'nowhere' is in the plan, but no node"):
        lower(linear_graph(weight()), {"nowhere": fit(weight(), Spec("dense"), FP32)}, accuracy_level=0)
    table = fit(weight(50, 8), Spec("dense"), FP32, role="embedding")
    with pytest.raises(ExportError, match="no node"):
        lower(linear_graph(weight()), {LAYER: table}, accuracy_level=0)


def test_cores_that_no_kernel_takes_are_refused() -> None:
    blocks = Contraction(12, 12, (BlockMatMul("turn", 1, 12),))
    quantised = Factors(blocks, {"turn": rtn.quantize(weight(12, 12), CoreFormat.parse("int4-b16"))})
    with pytest.raises(ExportError, match="'turn' is quantised, but no kernel"):
        lower(linear_graph(weight(12, 12)), {LAYER: quantised}, accuracy_level=0)
    table = fit(weight(50, 40), Spec("dense"), INT4, role="embedding")
    with pytest.raises(ExportError, match="rows of 40 do not divide into blocks of 32"):
        lower(table_graph(weight(50, 40)), {LAYER: table}, accuracy_level=0)


def test_int8_activations_are_close_to_float_ones(tmp_path: Path) -> None:
    """accuracy_level 4 costs about half a percent a matmul, and is what ships."""
    big = weight(128, 256)
    factors = fit(big, Spec("dense"), INT4)
    x = np.random.default_rng(0).standard_normal((1, 8, 256)).astype(np.float32)
    found = []
    for level in (0, 4):
        graph = linear_graph(big)
        lower(graph, {LAYER: replace(factors)}, accuracy_level=level)
        found.append(run_graph(graph.model, tmp_path / str(level), x))
    difference = np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[0])
    assert difference < 0.02
