"""A stack of equal matrix products with random weights, in the nodes that an export writes: `edgec.bench.kernels`
measures on it what a weight of one number format costs the runtime.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgec.export.onnx.graph import DenseGraph
from edgec.export.onnx.lowering import lower
from edgec.export.onnx.saving import save_model
from edgec.fit import Core, Factors, contraction_of
from edgec.quantize.formats import CoreFormat, QuantizedTensor
from edgec.records import Spec


def write_stack(
    folder: Path, fmt: CoreFormat, shape: tuple[int, int], copies: int, *, accuracy_level: int, int8: bool
) -> int:
    """Inputs x0 … [rows, in], one per product, so that none shares another's quantization of its input; one output, the
    last column of every product [rows, copies]. Into the existing folder; returns the stored bytes of all weights.

    shape: (out, in). int8: multiply as encoders may, see `int8_products`.
    """
    n, k = shape
    rng, contraction = np.random.default_rng(0), contraction_of(Spec("dense"), shape, "linear")
    dense = ir.Value(name="dense", const_value=ir.tensor(np.zeros((k, n), np.float32), name="dense"))
    last = ir.Value(name="last", const_value=ir.tensor(np.array([n - 1]), name="last"))
    inputs, nodes, linears, factors = [], [], {}, {}
    for i in range(copies):
        x = ir.Value(name=f"x{i}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", k]))
        product = ir.node("MatMul", [x, dense])
        product.outputs[0].name = f"y{i}"
        # One column of each product keeps every product alive without adding up whole matrices.
        nodes += [product, ir.node("Gather", [product.outputs[0], last], attributes={"axis": 1})]
        inputs.append(x)
        linears[f"layer{i}"] = product
        factors[f"layer{i}"] = Factors(contraction, {"weight": _core(fmt, n, k, rng)})
    nodes.append(ir.node("Concat", [node.outputs[0] for node in nodes[1::2]], attributes={"axis": 1}))
    out = nodes[-1].outputs[0]
    out.name, out.dtype, out.shape = "out", ir.DataType.FLOAT, ir.Shape(["rows", copies])
    graph = ir.Graph(inputs, [out], nodes=nodes, initializers=[dense, last], opset_imports={"": 21}, name="stack")
    model = ir.Model(graph, ir_version=10)
    lower(DenseGraph(model, linears, {}), factors, accuracy_level=accuracy_level, int8=int8)
    save_model(model, folder)
    return sum(fitted.stored_bytes for fitted in factors.values())


def _core(fmt: CoreFormat, n: int, k: int, rng: np.random.Generator) -> Core:
    if not fmt.quantised:
        return rng.standard_normal((n, k), dtype=np.float32).astype(np.float16 if fmt.bits == 16 else np.float32)
    blocks = fmt.blocks(k)
    codes = rng.integers(0, 1 << fmt.bits, (n, blocks * fmt.block), dtype=np.uint8)
    scales = rng.uniform(0.005, 0.02, (n, blocks)).astype(np.float16)  # equal tensors would be stored once
    return QuantizedTensor(fmt, (n, k), codes, scales)
