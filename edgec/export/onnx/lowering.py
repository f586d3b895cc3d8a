"""The ONNX lowering of a contraction: replace a dense node by MatMul / MatMulNBits / GatherBlockQuantized and
plain rearrangement; where a target wants it, an encoder's products by int8 ones (`int8_products`).

A pass over a `DenseGraph`. Requires: every planned layer's node is in the graph, its weight an initializer.
Ensures: the node is gone, its dense weight too (unless another node still reads it). Its output's name and shape stay,
on the new node, or on the sum (`biases`) or the attention (`attention`) that took an int8 product in. The dense graph
is consumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgec.contraction import run
from edgec.errors import ExportError
from edgec.export.onnx.attention import join_attentions
from edgec.export.onnx.biases import absorb_biases
from edgec.export.onnx.gelu import approximate_gelus
from edgec.export.onnx.graph import MICROSOFT, DenseGraph, constant
from edgec.export.onnx.int8_products import Int8Products, smoothing, takes
from edgec.fit import Core, Factors
from edgec.quantize.formats import QuantizedTensor

_LARGE_TABLE = 1 << 20
"""Scales from which a looked-up table keeps them in fp16 [count]. Behind a Cast onnxruntime would hold an fp32 copy of
them all (33 MB of a 1B model) instead of mapping the file's. In exchange its rows are rounded to
fp16, by 2⁻¹¹ at most, and cast, which is not worth it for small tables.
"""


class OnnxOps:
    """`edgec.contraction.Ops` that emits nodes. Values have `leading` axes that no step touches, then trailing ones."""

    def __init__(
        self,
        prefix: str,
        cores: Mapping[str, Core],
        leading: int,
        accuracy_level: int,
        shared: Set[int] = frozenset(),
        int8: Int8Products | None = None,
        smooth: tuple[ir.Value, NDArray[np.float16] | None] | None = None,
    ) -> None:
        """shared: ids of the cores that another layer stores too: their layout in the file must stay as it is. int8:
        emits the products that it can take, in place of MatMulNBits. smooth: the layer's input, and its `smoothing`.
        """
        self.prefix, self.cores, self.leading, self.accuracy_level = prefix, cores, leading, accuracy_level
        self.shared = shared
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.int8, self.smooth = int8, smooth

    def reshape(self, x: ir.Value, shape: tuple[int, ...], trailing: int) -> ir.Value:
        # 0 copies the axis of the input, so batch and sequence stay dynamic.
        target = self._constant(f"shape{len(self.nodes)}", np.array([0] * self.leading + list(shape), np.int64))
        return self._node("Reshape", [x, target])

    def transpose(self, x: ir.Value, perm: tuple[int, ...]) -> ir.Value:
        full = [*range(self.leading), *(self.leading + p for p in perm)]
        return self._node("Transpose", [x], perm=full)

    def matmul(self, x: ir.Value, core: str) -> ir.Value:
        stored = self.cores[core]
        if not isinstance(stored, QuantizedTensor) and id(stored) in self.shared:
            table = self._float(core, stored)
            return self._node("FusedMatMul", [x, table], domain=MICROSOFT, name=core, transB=1)
        if not isinstance(stored, QuantizedTensor):
            # Stored [in, out] so that the runtime multiplies without transposing; fp16 is cast once, when the session
            # is created.
            return self._node("MatMul", [x, self._float(core, np.ascontiguousarray(stored.T))], name=core)
        if self.int8 is not None and takes(stored):
            return self.int8.emit(
                x,
                stored,
                self.smooth[1] if self.smooth and x is self.smooth[0] else None,
                lambda name, array: self._constant(f"{core}.{name}", array),
                self.nodes,
                f"{self.prefix}/{core}",
            )
        n, k = stored.shape
        inputs = [x, self._constant(core + ".codes", stored.packed()), self._float(core + ".scales", stored.scales)]
        if (zero_points := stored.packed_zero_points()) is not None:
            inputs.append(self._constant(core + ".zero_points", zero_points))
        return self._node(
            "MatMulNBits",
            inputs,
            domain=MICROSOFT,
            name=core,
            K=k,
            N=n,
            bits=stored.fmt.bits,
            block_size=stored.fmt.block,
            accuracy_level=self.accuracy_level,
        )

    def block_matmul(self, x: ir.Value, core: str) -> ir.Value:
        blocks = self._plain(core)
        g, b, _ = blocks.shape
        split = self.reshape(x, (g, 1, b), 1)
        product = self._node(
            "MatMul", [split, self._float(core, np.ascontiguousarray(blocks.transpose(0, 2, 1)))], name=core
        )
        return self.reshape(product, (g * b,), 3)

    def scale(self, x: ir.Value, core: str) -> ir.Value:
        return self._node("Mul", [x, self._float(core, self._plain(core))], name=core)

    def reduce_sum(self, x: ir.Value, axis: int, trailing: int) -> ir.Value:
        axes = self._constant(f"axes{len(self.nodes)}", np.array([self.leading + axis], np.int64))
        return self._node("ReduceSum", [x, axes], keepdims=0)

    def gather(self, ids: ir.Value, core: str) -> ir.Value:
        stored = self.cores[core]
        if not isinstance(stored, QuantizedTensor):
            return self._node("Gather", [self._float(core, stored), ids], name=core, axis=0)
        v, n = stored.shape
        if n % stored.fmt.block:
            raise ExportError(f"{self.prefix}: rows of {n} do not divide into blocks of {stored.fmt.block}")
        half = stored.scales.dtype == np.float16 and stored.scales.size >= _LARGE_TABLE
        scales = (self._constant if half else self._float)(core + ".scales", stored.scales)
        inputs = [self._constant(core + ".codes", stored.packed().reshape(v, -1)), ids, scales]
        if (zero_points := stored.packed_zero_points()) is not None:
            inputs.append(self._constant(core + ".zero_points", zero_points))
        rows = self._node(
            "GatherBlockQuantized",
            inputs,
            domain=MICROSOFT,
            name=core,
            dtype=ir.DataType.FLOAT16 if half else ir.DataType.FLOAT,
            gather_axis=0,
            quantize_axis=1,
            bits=stored.fmt.bits,
            block_size=stored.fmt.block,
        )
        return self._node("Cast", [rows], name=f"{core}.rows", to=ir.DataType.FLOAT) if half else rows

    def add(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self._node("Add", [x, y])

    def _plain(self, core: str) -> NDArray[Any]:
        stored = self.cores[core]
        if isinstance(stored, QuantizedTensor):
            raise ExportError(f"{self.prefix}: core {core!r} is quantised, but no kernel takes it so")
        return stored

    def _float(self, name: str, array: NDArray[Any]) -> ir.Value:
        """An fp32 value; stored as it is, behind a Cast where it is stored as fp16."""
        value = self._constant(name, array)
        return value if array.dtype == np.float32 else self._node("Cast", [value], to=ir.DataType.FLOAT)

    def _constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        full = f"{self.prefix}/{name}"
        value = constant(ir.Tensor(np.ascontiguousarray(array), name=full))
        self.initializers.append(value)
        return value

    def _node(
        self,
        op: str,
        inputs: list[ir.Value],
        *,
        domain: str = "",
        name: str = "",
        dtype: ir.DataType = ir.DataType.FLOAT,
        **attributes: Any,
    ) -> ir.Value:
        title = f"{self.prefix}/{name or f'step{len(self.nodes)}'}/{op}"
        node = ir.node(op, inputs, attributes=attributes, domain=domain, name=title)
        output = node.outputs[0]
        output.name, output.dtype = f"{title}/output_0", dtype
        self.nodes.append(node)
        return output


def lower(graph: DenseGraph, factors: Mapping[str, Factors], *, accuracy_level: int, int8: bool = False) -> None:
    """Replace every layer in `factors` in place; int8: multiply as `int8_products` does. Raises ExportError naming a
    layer that the graph does not have.
    """
    model = graph.model.graph
    products = Int8Products(graph.model) if int8 else None
    uses = Counter(id(core) for fitted in factors.values() for core in fitted.cores.values())
    shared = {core for core, count in uses.items() if count > 1}
    for name, fitted in factors.items():
        node = (graph.embeddings if fitted.contraction.lookup else graph.linears).get(name)
        if node is None:
            raise ExportError(f"lowering: layer {name!r} is in the plan, but no node of the graph computes it")
        _replace(model, node, name, fitted, accuracy_level, shared, products)
    if products is not None:
        absorb_biases(model)
        join_attentions(graph.model)
        approximate_gelus(model)
    drop_unused(model)
    if products is not None:
        model.sort()  # what products share was put before the first of them in the plan's order
    if graph.model.opset_imports.get(MICROSOFT) is None:
        graph.model.opset_imports[MICROSOFT] = 1


def _replace(
    model: ir.Graph,
    node: ir.Node,
    name: str,
    fitted: Factors,
    accuracy_level: int,
    shared: Set[int],
    int8: Int8Products | None,
) -> None:
    lookup = fitted.contraction.lookup
    x = node.inputs[1 if lookup else 0]
    old = node.outputs[0]
    if x is None:
        raise ExportError(f"lowering: the node of layer {name!r} has no input")
    leading = _leading(x, lookup, name)
    smooth = (x, smoothing(fitted.input_rms)) if int8 is not None and fitted.input_rms is not None else None
    ops = OnnxOps(name, fitted.cores, leading, accuracy_level, shared, int8, smooth)
    y = run(fitted.contraction.steps, ops, x, fitted.contraction.start)
    for value in ops.initializers:
        model.register_initializer(value)
    model.insert_before(node, ops.nodes)
    y.name, y.shape, y.type = old.name, old.shape, old.type
    ir.convenience.replace_all_uses_with(old, y, replace_graph_outputs=True)
    old.name = f"{old.name}/dense"
    model.remove(node, safe=True)


def _leading(x: ir.Value, lookup: bool, name: str) -> int:
    """How many leading axes x has: the graph's shape inference knows; where it does not, activations are 3-D."""
    if x.shape is not None:
        return len(x.shape) if lookup else len(x.shape) - 1
    return 2


def drop_unused(model: ir.Graph) -> None:
    """Remove nodes and initializers that nothing reads any more (a dense weight behind its Transpose, say)."""
    outputs = {id(v) for v in model.outputs}
    changed = True
    while changed:
        changed = False
        for node in list(reversed(list(model))):
            if all(not out.uses() and id(out) not in outputs for out in node.outputs):
                model.remove(node, safe=True)
                changed = True
    for name, value in list(model.initializers.items()):
        if not value.uses() and id(value) not in outputs:
            del model.initializers[name]
