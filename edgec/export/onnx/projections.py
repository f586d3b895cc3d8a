"""Products of one input and one number format as one product.

A product costs a decoder two waits of all threads and a rounding of its input to int8, whatever its size; of a small
model query, key and value, gate and up are a fifth of a step. Their codes are laid one under the other: the same
numbers, bit for bit, and the same bytes. onnxruntime's attention takes its three packed in one tensor. The others (gate
and up, first cores of factored layers) are taken apart by a Split, which copies them: nothing for a token, but a long
prompt's are held twice meanwhile, so large products, which gain least, stay apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgec.export.onnx.graph import MICROSOFT
from edgec.export.onnx.lowering import drop_unused

_SAME = ("K", "bits", "block_size", "accuracy_level")
_MOST_SPLIT = 1 << 22
"""Weights of products that a Split takes apart [count]: with more of them, reading takes twenty times what is saved."""


def pack_projections(model: ir.Model) -> int:
    """Pack in place wherever several such products read one value; returns how many products are left out by it."""
    before = len(_products(model.graph))
    found: dict[object, list[ir.Node]] = {}
    for node in _products(model.graph):
        if len(node.outputs[0].uses()) and node.outputs[0].name not in _names(model.graph.outputs):
            found.setdefault(_kind(node), []).append(node)
    for products in found.values():
        attention = _attention_of([node.outputs[0] for node in products])
        if attention is not None or (len(products) > 1 and _weights(products) <= _MOST_SPLIT):
            _pack(model.graph, products, attention)
    drop_unused(model.graph)
    return before - len(_products(model.graph))


def _products(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "MatMulNBits"]


def _names(values: Sequence[ir.Value]) -> set[str | None]:
    return {value.name for value in values}


def _kind(node: ir.Node) -> object:
    """Equal for products that can be one: what they read, how many numbers of which format."""
    stored = tuple(_stored(value).dtype for value in node.inputs[1:])
    return id(node.inputs[0]), tuple(node.attributes[name].as_int() for name in _SAME), stored


def _weights(products: list[ir.Node]) -> int:
    return sum(node.attributes["N"].as_int() * node.attributes["K"].as_int() for node in products)


def _stored(value: ir.Value | None) -> ir.Value:
    """The constant that an operand is, or is cast from."""
    assert value is not None
    cast = value.producer()
    found = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else value
    assert found is not None
    return found


def _pack(graph: ir.Graph, products: list[ir.Node], attention: ir.Node | None) -> None:
    """attention: which takes them as they are packed; None for a Split."""
    first = products[0]
    name = f"{first.name}.packed"
    operands, added = [first.inputs[0]], []
    for place in range(1, len(first.inputs)):
        parts = [_stored(node.inputs[place]) for node in products]
        value = _joined(parts)
        graph.register_initializer(value)
        if parts[0] is not first.inputs[place]:
            added.append(ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}))
            value = added[-1].outputs[0]
            value.name = f"{parts[0].name}.packed/Cast"
        operands.append(value)
    rows = [node.attributes["N"].as_int() for node in products]
    attributes = {key: first.attributes[key].as_int() for key in _SAME}
    product = ir.node("MatMulNBits", operands, attributes={**attributes, "N": sum(rows)}, domain=MICROSOFT, name=name)
    packed = product.outputs[0]
    packed.name, packed.type = f"{first.outputs[0].name}.packed", ir.TensorType(ir.DataType.FLOAT)
    added.append(product)
    outputs = [node.outputs[0] for node in products]
    if attention is not None:
        graph.insert_before(first, added)
        attention.replace_input_with(0, packed)
        for place in (1, 2):
            attention.replace_input_with(place, None)
        return
    sizes = ir.Value(name=f"{name}/sizes", const_value=ir.tensor(np.array(rows, np.int64), name=f"{name}/sizes"))
    sizes.shape, sizes.dtype = ir.Shape([len(rows)]), ir.DataType.INT64
    graph.register_initializer(sizes)
    split = ir.node("Split", [packed, sizes], attributes={"axis": -1}, num_outputs=len(rows), name=f"{name}/Split")
    graph.insert_before(first, [*added, split])
    for old, new in zip(outputs, split.outputs, strict=True):
        new.shape, new.type, new.name = old.shape, old.type, f"{old.name}.of_packed"
        old.replace_all_uses_with(new)


def _joined(parts: list[ir.Value]) -> ir.Value:
    """Constants one under the other. Lazily, so that a large model is not held twice."""
    tensors = [part.const_value for part in parts if part.const_value is not None]
    shape = ir.Shape([sum(int(t.shape.numpy()[0]) for t in tensors), *tensors[0].shape.numpy()[1:]])
    name = f"{parts[0].name}.packed"

    def join() -> ir.TensorProtocol:
        return ir.Tensor(np.concatenate([t.numpy() for t in tensors]), name=name)

    lazy = ir.LazyTensor(join, dtype=tensors[0].dtype, shape=shape, name=name)
    return ir.Value(name=name, const_value=lazy, shape=shape, type=ir.TensorType(lazy.dtype))


def _attention_of(outputs: list[ir.Value]) -> ir.Node | None:
    """The attention that reads these three alone as query, key and value."""
    readers = [use.node for value in outputs for use in value.uses()]
    attention = readers[0]
    fits = len(outputs) == len(readers) == 3 and attention.op_type == "GroupQueryAttention"
    return attention if fits and all(attention.inputs[k] is value for k, value in enumerate(outputs)) else None
