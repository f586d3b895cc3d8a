"""One-layer ONNX graphs, as a front end would hand them to the lowering, and onnxruntime to run them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from edgec.export.onnx.graph import DenseGraph
from edgec.export.onnx.saving import MODEL_FILE, save_model

LAYER = "block.0.layer"


def value(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def constant(name: str, array: NDArray[Any]) -> ir.Value:
    held = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
    held.shape, held.dtype = ir.Shape(array.shape), held.const_value.dtype  # type: ignore[union-attr]
    return held


def model_of(inputs: list[ir.Value], nodes: list[ir.Node], output: ir.Value, weights: list[ir.Value]) -> ir.Model:
    graph = ir.Graph(inputs, [output], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="layer")
    return ir.Model(graph, ir_version=10)


def linear_graph(weight: NDArray[Any], bias: NDArray[Any] | None = None) -> DenseGraph:
    """x [B, T, in] → x Wᵀ (+ bias) [B, T, out], the weight stored [in, out]."""
    out, in_ = weight.shape
    x, stored = value("x", ir.DataType.FLOAT, ["B", "T", in_]), constant("weight", np.ascontiguousarray(weight.T))
    node = ir.node("MatMul", [x, stored], name="linear")
    nodes, weights = [node], [stored]
    y = node.outputs[0]
    y.name, y.shape, y.dtype = "y", ir.Shape(["B", "T", out]), ir.DataType.FLOAT
    if bias is not None:
        y.name = "product"
        weights.append(constant("bias", bias))
        nodes.append(ir.node("Add", [y, weights[-1]], name="bias"))
        y = nodes[-1].outputs[0]
        y.name, y.shape, y.dtype = "y", ir.Shape(["B", "T", out]), ir.DataType.FLOAT
    return DenseGraph(model_of([x], nodes, y, weights), {LAYER: node}, {})


def table_graph(table: NDArray[Any]) -> DenseGraph:
    """x: token ids [B, T] → rows [B, T, d]."""
    x, stored = value("x", ir.DataType.INT64, ["B", "T"]), constant("table", table)
    node = ir.node("Gather", [stored, x], name="lookup")
    y = node.outputs[0]
    y.name, y.shape, y.dtype = "y", ir.Shape(["B", "T", table.shape[1]]), ir.DataType.FLOAT
    return DenseGraph(model_of([x], [node], y, [stored]), {}, {LAYER: node})


def session(model: ir.Model, folder: Path, optimized: Path | None = None) -> Any:
    """An onnxruntime session over the files that `save_model` writes, one thread."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(folder / MODEL_FILE, options, providers=["CPUExecutionProvider"])


def run_graph(model: ir.Model, folder: Path, x: NDArray[Any]) -> NDArray[Any]:
    result: NDArray[Any] = session(model, folder).run(None, {"x": x})[0]
    return result
