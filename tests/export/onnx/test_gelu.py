"""GELUs in their tanh form where int8 products read them, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs_for_tests import constant, model_of, run_graph, value

from edgec.export.onnx.gelu import approximate_gelus, exact_gelus
from edgec.export.onnx.graph import MICROSOFT

WIDTH = 64


def gelu_graph(read: str) -> ir.Model:
    """x [B, T, d] → y, a GELU's output as int8 and as floats again, or what `read` says beside."""
    x = value("x", ir.DataType.FLOAT, ["B", "T", WIDTH])
    held = [constant("bias", np.zeros(WIDTH, np.float32)), constant("inverse", np.full(WIDTH, 0.5, np.float32))]
    gelu = ir.node("BiasGelu", [x, held[0]], domain=MICROSOFT)
    nodes = [gelu]
    if read in ("smoothed", "smoothed and more"):
        nodes.append(ir.node("Mul", [gelu.outputs[0], held[1]]))
    if read != "floats":
        nodes.append(ir.node("DynamicQuantizeLinear", [nodes[-1].outputs[0]], num_outputs=3))
        nodes.append(ir.node("DequantizeLinear", nodes[-1].outputs))
    if read in ("and more", "floats", "smoothed and more"):
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], nodes[-1 if read == "floats" else -3].outputs[0]]))
    for number, node in enumerate(nodes):
        for place, output in enumerate(node.outputs):
            output.name = f"v{number}.{place}"
    y = nodes[-1].outputs[0]
    y.shape, y.dtype = ir.Shape(["B", "T", WIDTH]), ir.DataType.FLOAT
    model = model_of([x], nodes, y, held)
    model.opset_imports[MICROSOFT] = 1
    if read == "an output":
        gelu.outputs[0].shape, gelu.outputs[0].dtype = y.shape, y.dtype
        model.graph.outputs.append(gelu.outputs[0])
    return model


@pytest.mark.parametrize(
    ("read", "replaced"),
    [
        ("rounded", 1),
        ("smoothed", 1),
        ("floats", 0),
        ("and more", 0),
        ("smoothed and more", 0),
        ("an output", 0),
    ],
)
def test_those_that_are_rounded_are_replaced(read: str, replaced: int, tmp_path: Path) -> None:
    model = gelu_graph(read)
    x = np.linspace(-8, 8, 4 * WIDTH, dtype=np.float32).reshape(1, 4, WIDTH)
    expected: np.ndarray[Any, Any] = run_graph(model, tmp_path / "exact", x)
    assert approximate_gelus(model.graph) == replaced
    assert [node.op_type for node in model.graph][0] == ("FastGelu" if replaced else "BiasGelu")
    step = np.ptp(expected) / 255
    assert np.abs(run_graph(model, tmp_path / "tanh", x) - expected).max() <= 1.01 * step  # a code more or less
    exact_gelus(model.graph)
    np.testing.assert_array_equal(run_graph(model, tmp_path / "again", x), expected)


def test_the_two_forms_differ_by_as_little_as_it_says(tmp_path: Path) -> None:
    model = gelu_graph("floats")
    x = np.linspace(-8, 8, 400 * WIDTH, dtype=np.float32).reshape(1, 400, WIDTH)
    exact = run_graph(model, tmp_path / "exact", x) / 2
    for node in model.graph:
        node.op_type = "FastGelu" if node.op_type == "BiasGelu" else node.op_type
    assert 1e-4 < np.abs(run_graph(model, tmp_path / "tanh", x) / 2 - exact).max() < 5e-4
