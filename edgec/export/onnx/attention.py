"""Query, key and value in int8 together with their attention, where nothing but padding is masked.

onnxruntime's QAttention multiplies one int8 input with the three weights head by head, and goes on with what is still
in the cache; apart, three products are written to memory and copied from heads side by side to heads one after the
other. The numbers are the same ones, for rows of any token and masks of 0 and 1. Its many small products share two
threads better: MiniLM takes 4 to 6 % less time for 32 sentences of 19 tokens, 2 % for 32 of 64, 8 % for one; one thread
is level (0 to 2 % either way, 4 % less for 512 tokens; onnxruntime 1.31, interleaved runs in seven processes).

QAttention takes no bias on its scores but a mask of tokens. What a model adds to its scores is therefore asked by
running that part of the graph, not read off its nodes, which are as many as there are models and versions of
transformers: an attention is joined when zero is added for every token that is there, and a large negative number for
every other. One that nothing is added to stays as it is: onnxruntime computes that without writing its scores down.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.export.onnx.graph import MICROSOFT
from edgec.export.onnx.int8_products import BIAS
from edgec.runtime.options import RuntimeOptions, import_onnxruntime, session_options

logger = logging.getLogger(__name__)

_SCORES_BIAS = 5
"""Place of what is added to the scores among the inputs of MultiHeadAttention."""
_MASK_INPUT = "attention_mask"
_TRIALS = ((3, 5), (2, 9), (1, 1100))
"""Batch and length of the masks that are tried. The long one is to meet windows, which reach 512 tokens to a side."""
_MASKED = -1e4
"""The most that may be added for a token that is not there: exp of it is zero in fp32. QAttention's own number."""


def join_attentions(model: ir.Model) -> int:
    """Join, in place, every attention with the products of its query, key and value; returns how many it were.

    Left as they are: attentions whose three products differ in their input, its smoothing or their width, lack a
    bias, or have another reader, and those that add anything but a mask to their scores.
    """
    graph = model.graph
    joined, mask, asked = 0, None, dict[ir.Value, bool]()
    for node in [n for n in graph if n.op_type == "MultiHeadAttention"]:
        added = node.inputs[_SCORES_BIAS] if len(node.inputs) > _SCORES_BIAS else None
        if added is None or not (products := _products(node, added)):
            continue
        if added not in asked:
            asked[added] = _is_padding(model, added)
        if asked[added]:
            mask = mask or _mask_of(graph)
            _join(graph, node, products, mask)
            joined += 1
    return joined


def _products(node: ir.Node, added: ir.Value) -> Sequence[ir.Node]:
    """Those of query, key and value where QAttention can take them, else none."""
    if any(value is not None and value is not added for value in node.inputs[3:]):
        return ()
    if set(node.attributes) != {"num_heads"} or len(node.outputs) != 1:
        return ()
    products = [value.producer() for value in node.inputs[:3] if value is not None and len(value.uses()) == 1]
    found = [p for p in products if p is not None and p.op_type == "MatMulIntegerToFloat" and len(p.inputs) > BIAS]
    if len(found) < 3 or any(product.outputs[0].is_graph_output() for product in found):
        return ()
    inputs = {(product.inputs[0], product.inputs[2], product.inputs[4]) for product in found}
    widths = {tuple(bias.shape) for product in found if (bias := product.inputs[BIAS]) is not None and bias.shape}
    return found if len(inputs) == len(widths) == 1 else ()


def _join(graph: ir.Graph, node: ir.Node, products: Sequence[ir.Node], mask: ir.Value) -> None:
    quantised, _, scale, _, zero = products[0].inputs[:5]
    sides = [
        ir.node("Concat", [product.inputs[place] for product in products], attributes={"axis": axis})
        for place, axis in ((1, 1), (BIAS, 0), (3, 0))
    ]
    for side, name in zip(sides, ("weights", "biases", "rows"), strict=True):
        side.outputs[0].name = f"{products[0].name}/{name}"
    weights, biases, rows = (side.outputs[0] for side in sides)
    whole = ir.node(
        "QAttention",
        [quantised, weights, biases, scale, rows, mask, zero],
        attributes={"num_heads": node.attributes["num_heads"].as_int()},
        domain=MICROSOFT,
        name=node.name,
    )
    ir.convenience.replace_nodes_and_values(graph, node, [node], [*sides, whole], node.outputs, whole.outputs)
    graph.remove(products, safe=True)


def _mask_of(graph: ir.Graph) -> ir.Value:
    """The graph's mask of tokens [batch, length] as int32, which QAttention wants."""
    given = next(value for value in graph.inputs if value.name == _MASK_INPUT)
    cast = ir.node("Cast", [given], attributes={"to": ir.DataType.INT32})
    cast.outputs[0].name = f"{_MASK_INPUT}.int32"
    graph.insert_before(graph[0], cast)
    return cast.outputs[0]


def _is_padding(model: ir.Model, added: ir.Value) -> bool:
    """Is what is added to the scores zero for tokens that are there, and hides the others, whatever the tokens are?
    No, where it cannot be asked.
    """
    inputs = [value for value in model.graph.inputs if value.name]
    if _MASK_INPUT not in [value.name for value in inputs]:
        return False
    try:
        part = ir.Model(ir.convenience.extract(model.graph, inputs, [added]), ir_version=model.ir_version)
        part.functions.update(model.functions)
        session = import_onnxruntime().InferenceSession(
            ir.to_proto(part).SerializeToString(), session_options(RuntimeOptions(threads=1)), ["CPUExecutionProvider"]
        )
        return all(_hides_padding(session, shape) for shape in _TRIALS)
    except Exception as error:  # noqa: BLE001 (onnxruntime's and onnx_ir's errors share no base class)
        logger.debug("attention stays apart: what it adds to its scores cannot be asked: %s", error)
        return False


def _hides_padding(session: Any, shape: tuple[int, int]) -> bool:
    """Of a graph from the model's inputs to what is added: one row without padding, others with, random tokens."""
    generator = np.random.default_rng(0)
    mask = generator.integers(0, 2, shape)
    mask[0, : shape[1] if len(mask) > 1 else shape[1] // 2] = 1
    feeds = {each.name: generator.integers(0, 2, shape) for each in session.get_inputs()} | {_MASK_INPUT: mask}
    (found,) = session.run(None, {each.name: feeds[each.name] for each in session.get_inputs()})
    there, found = np.broadcast_arrays(mask[:, None, None, :] == 1, found)
    return bool((found[there] == 0).all() and (found[~there] <= _MASKED).all())
