"""Products of one input and one number format as one product.

A product costs a decoder two waits of all threads and a rounding of its input to int8, whatever its size, which a small
model notices. (One of 5.8 M parameters in int4, two threads, in one process: 5,656 tokens/s instead of 5,519 with gate
and up packed too.) Their codes are laid one under the other: the same numbers, bit for bit, and the same bytes.

onnxruntime's attention takes its three packed in one tensor. The others (gate and up, first cores of factored layers)
are taken apart by a Split, which copies them: nothing for a token, but a long prompt's are held twice meanwhile, so
large products, which gain least, stay apart.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgec.export.onnx.graph import MICROSOFT, constant
from edgec.export.onnx.lowering import drop_unused

_SAME = ("K", "bits", "block_size", "accuracy_level")
_MOST_SPLIT = 1 << 22
"""Weights of products that a Split takes apart [count]: with more of them, reading takes twenty times what is saved."""


def pack_projections(model: ir.Model) -> int:
    """Pack in place wherever several such products read one value; returns how many products are left out by it."""
    graph = model.graph
    before = _products(graph)
    alike: dict[object, list[ir.Node]] = {}
    for node in before:
        if not any(end.is_graph_output() for end in (node.outputs[0], _end(node))):
            alike.setdefault(_kind(node), []).append(node)
    for products in alike.values():
        attention = _attention_of([_end(node) for node in products])
        if attention is not None or (len(products) > 1 and _weights(products) <= _MOST_SPLIT):
            _pack(graph, products, attention)
    drop_unused(graph)
    return len(before) - len(_products(graph))


def _products(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "MatMulNBits"]


def _bias(product: ir.Node) -> ir.Value | None:
    """What the one reader of a product adds to all of its rows, where it does."""
    (output,) = product.outputs
    readers = [use.node for use in output.uses()]
    if [reader.op_type for reader in readers] != ["Add"]:
        return None
    for added in readers[0].inputs:
        stored = None if added is output else _stored(added).const_value
        if stored is not None and list(stored.shape.numpy()) == [product.attributes["N"].as_int()]:
            return added
    return None


def _end(product: ir.Node) -> ir.Value:
    """What a product, and the bias behind it, come to."""
    output: ir.Value = product.outputs[0]
    return output if _bias(product) is None else next(iter(output.uses())).node.outputs[0]


def _kind(node: ir.Node) -> object:
    """Equal for products that can be one: what they read, how many numbers of which format, and whether of a bias."""
    stored = tuple(_stored(value).dtype for value in (*node.inputs[1:], _bias(node)) if value is not None)
    return id(node.inputs[0]), tuple(node.attributes[name].as_int() for name in _SAME), stored, _bias(node) is None


def _weights(products: list[ir.Node]) -> int:
    return sum(node.attributes["N"].as_int() * node.attributes["K"].as_int() for node in products)


def _stored(value: ir.Value | None) -> ir.Value:
    """The constant that an operand is, or is cast from."""
    assert value is not None
    cast = value.producer()
    found = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else value
    assert found is not None
    return found


def _attention_of(ends: list[ir.Value]) -> ir.Node | None:
    """The attention that reads these three alone as query, key and value."""
    readers = [use.node for value in ends for use in value.uses()]
    fits = len(ends) == len(readers) == 3 and readers[0].op_type == "GroupQueryAttention"
    return readers[0] if fits and all(readers[0].inputs[k] is value for k, value in enumerate(ends)) else None


def _pack(graph: ir.Graph, products: list[ir.Node], attention: ir.Node | None) -> None:
    """attention: which takes them as they are packed; None for a Split."""
    first, ends, biases = products[0], [_end(node) for node in products], [_bias(node) for node in products]
    name = f"{first.name}.packed"
    nodes: list[ir.Node] = []
    rows = [node.attributes["N"].as_int() for node in products]
    operands = [
        _joined(graph, f"{name}/input_{k}", [node.inputs[k] for node in products], nodes)
        for k in range(1, len(first.inputs))
    ]
    attributes = {key: first.attributes[key].as_int() for key in _SAME} | {"N": sum(rows)}
    nodes.append(ir.node("MatMulNBits", [first.inputs[0], *operands], attributes, domain=MICROSOFT, name=name))
    packed = _named(nodes[-1])
    if biases[0] is not None:
        summands = [packed, _joined(graph, f"{name}/bias", biases, nodes)]
        nodes.append(ir.node("Add", summands, name=f"{name}/Add"))
        packed = _named(nodes[-1])
    if attention is not None:
        graph.insert_before(first, nodes)
        attention.replace_input_with(0, packed)
        for place in (1, 2):
            attention.replace_input_with(place, None)
        return
    sizes = constant(ir.tensor(np.array(rows, np.int64), name=f"{name}/sizes"))
    graph.register_initializer(sizes)
    nodes.append(ir.node("Split", [packed, sizes], {"axis": -1}, num_outputs=len(rows), name=f"{name}/Split"))
    graph.insert_before(first, nodes)
    for old, new in zip(ends, nodes[-1].outputs, strict=True):
        new.shape, new.type, new.name = old.shape, old.type, f"{old.name}.of_packed"
        old.replace_all_uses_with(new)


def _named(node: ir.Node) -> ir.Value:
    """The output of a node of floats, called after it."""
    output: ir.Value = node.outputs[0]
    output.name, output.type = f"{node.name}/output_0", ir.TensorType(ir.DataType.FLOAT)
    return output


def _joined(graph: ir.Graph, name: str, values: list[ir.Value | None], nodes: list[ir.Node]) -> ir.Value:
    """Operands one under the other, behind a Cast in `nodes` where they were behind one. Their bytes are put together
    when the file is written, so that a large model is not held twice.
    """
    parts = [_stored(value) for value in values]
    tensors = [part.const_value for part in parts if part.const_value is not None]
    shape = ir.Shape([sum(int(t.shape.numpy()[0]) for t in tensors), *tensors[0].shape.numpy()[1:]])

    def join() -> ir.TensorProtocol:
        return ir.Tensor(np.concatenate([t.numpy() for t in tensors]), name=name)

    value = constant(ir.LazyTensor(join, dtype=tensors[0].dtype, shape=shape, name=name))
    graph.register_initializer(value)
    if parts[0] is values[0]:
        return value
    nodes.append(ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{name}/Cast"))
    return _named(nodes[-1])
