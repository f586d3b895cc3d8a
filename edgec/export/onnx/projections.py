"""Query, key and value projections of one number format as one product.

A product costs a decoder two waits of all threads and a rounding of its input to int8, whatever its size; of a small
model that is a tenth of a step. onnxruntime's attention takes the three packed in one tensor, so where the plan gave
them the same format their codes are laid one under the other: the same numbers, bit for bit, and the same bytes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgec.export.onnx.graph import MICROSOFT
from edgec.export.onnx.lowering import drop_unused

_SAME = ("K", "bits", "block_size", "accuracy_level")


def pack_projections(model: ir.Model) -> int:
    """Pack in place wherever an attention reads three such products of one input; returns how many it were."""
    packed = 0
    for attention in [node for node in model.graph if node.op_type == "GroupQueryAttention"]:
        products = [value.producer() if value is not None else None for value in attention.inputs[:3]]
        found = [node for node in products if node is not None]
        if len(found) == 3 and _alike(found):
            _pack(model.graph, attention, found)
            packed += 1
    drop_unused(model.graph)
    return packed


def _alike(products: list[ir.Node]) -> bool:
    """Products of one input by weights of one format, each read by one attention alone."""
    first = products[0]
    return all(
        node.op_type == "MatMulNBits"
        and node.inputs[0] is first.inputs[0]
        and len(node.outputs[0].uses()) == 1
        and len(node.inputs) == len(first.inputs)
        and all(node.attributes[name].as_int() == first.attributes[name].as_int() for name in _SAME)
        and [_stored(value).dtype for value in node.inputs[1:]] == [_stored(value).dtype for value in first.inputs[1:]]
        for node in products
    )


def _stored(value: ir.Value | None) -> ir.Value:
    """The constant that an operand is, or is cast from."""
    assert value is not None
    cast = value.producer()
    found = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else value
    assert found is not None
    return found


def _pack(graph: ir.Graph, attention: ir.Node, products: list[ir.Node]) -> None:
    first = products[0]
    operands, added = [first.inputs[0]], []
    for place in range(1, len(first.inputs)):
        parts = [_stored(node.inputs[place]) for node in products]
        joined = np.concatenate([part.const_value.numpy() for part in parts if part.const_value is not None])
        tensor = ir.Tensor(joined, name=f"{parts[0].name}.qkv")
        value = ir.Value(name=tensor.name, const_value=tensor)
        value.shape, value.dtype = ir.Shape(joined.shape), tensor.dtype
        graph.register_initializer(value)
        if parts[0] is not first.inputs[place]:
            added.append(ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}))
            value = added[-1].outputs[0]
            value.name = f"{parts[0].name}.qkv/Cast"
        operands.append(value)
    rows = sum(node.attributes["N"].as_int() for node in products)
    attributes = {name: first.attributes[name].as_int() for name in _SAME}
    product = ir.node("MatMulNBits", operands, attributes={**attributes, "N": rows}, domain=MICROSOFT)
    product.name = f"{first.name}.qkv"
    product.outputs[0].name, product.outputs[0].dtype = f"{first.outputs[0].name}.qkv", ir.DataType.FLOAT
    graph.insert_before(first, [*added, product])
    attention.replace_input_with(0, product.outputs[0])
    for place in (1, 2):
        attention.replace_input_with(place, None)
