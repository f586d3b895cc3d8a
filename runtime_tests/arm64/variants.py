"""Edits of an exported ONNX model that run on x86-64 and show what arm64 does, or what rounding does.

On arm64 onnxruntime runs a 4-bit `MatMulNBits` without zero points in KleidiAI's packed kernels. They round
differently from every other path (measured here to 2e-7 in single operators): activations to asymmetric int8 with
one scale per row (elsewhere: symmetric, one scale per block), and weight scales cut off, not rounded, to bfloat16.
`packed_arm_kernels` writes exactly that into the graph with standard operators, so that the difference between
the machines can be explained instead of tolerated, and so that an x86-64 machine can say what a phone will compute.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

PORTABLE_KERNELS = {"mlas.disable_kleidiai": "1"}
"""Session entries that keep onnxruntime to the kernels which round as x86-64 does."""

_ROW_INT8 = """
<domain: "edgec.test", opset_import: ["": {opset}]>
RowInt8 (x) => (y) {{
    last = Constant <value_ints = [-1]> ()
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    levels = Constant <value_float = 255.0> ()
    top = Constant <value_float = 127.0> ()
    bottom = Constant <value_float = -128.0> ()
    least = ReduceMin <keepdims = 1> (x, last)
    most = ReduceMax <keepdims = 1> (x, last)
    low = Min (least, zero)
    high = Max (most, zero)
    range = Sub (high, low)
    empty = Equal (range, zero)
    steps = Div (levels, range)
    scale = Where (empty, one, steps)
    scaled_low = Mul (low, scale)
    scaled_high = Mul (high, scale)
    balance = Add (scaled_low, scaled_high)
    low_is_nearer = Greater (balance, one)
    from_low = Sub (bottom, scaled_low)
    from_high = Sub (top, scaled_high)
    offset = Where (low_is_nearer, from_low, from_high)
    clipped_offset = Clip (offset, bottom, top)
    origin = Round (clipped_offset)
    scaled = Mul (x, scale)
    rounded = Round (scaled)
    shifted = Add (rounded, origin)
    code = Clip (shifted, bottom, top)
    centred = Sub (code, origin)
    y = Div (centred, scale)
}}
"""


def without_rounding(model: Path, folder: Path) -> Path | None:
    """The model with `accuracy_level` 4 unset (activations stay float), or None when no node sets it."""

    def edit(proto: onnx.ModelProto) -> bool:
        nodes = [node for node in proto.graph.node if _attributes(node).get("accuracy_level") == 4]
        for node in nodes:
            _leave_unrounded(node)
        return bool(nodes)

    return _variant(model, folder, edit)


def packed_arm_kernels(model: Path, folder: Path) -> Path | None:
    """The model with the rounding of the packed arm64 kernels spelled out, or None when no node would run in them."""

    def edit(proto: onnx.ModelProto) -> bool:
        places = [place for place, node in enumerate(proto.graph.node) if _is_packed_on_arm(node)]
        if not places:
            return False
        opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
        proto.functions.append(onnx.parser.parse_function(_ROW_INT8.format(opset=opset)))
        proto.opset_import.append(helper.make_opsetid("edgec.test", 1))
        for place in reversed(places):
            _spell_out(proto.graph, place, model.parent)
        return True

    return _variant(model, folder, edit)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def _is_packed_on_arm(node: onnx.NodeProto) -> bool:
    """onnxruntime's condition: 4 bits, int8 activations, no zero points or g_idx, whole blocks of a multiple of 32."""
    if node.op_type != "MatMulNBits":
        return False
    values = _attributes(node)
    block = values["block_size"]
    whole = block % 32 == 0 and values["K"] % block == 0
    return values["bits"] == 4 and values.get("accuracy_level") == 4 and whole and not any(node.input[3:5])


def _leave_unrounded(node: onnx.NodeProto) -> None:
    for entry in node.attribute:
        if entry.name == "accuracy_level":
            entry.i = 0


def _spell_out(graph: onnx.GraphProto, place: int, folder: Path) -> None:
    """Round a node's input by rows in front of it, cut its scales off to bfloat16, and let it compute in float."""
    node = graph.node[place]
    scales = _constant(graph, node.input[2], folder).astype(np.float32)
    cut = (scales.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    graph.initializer.append(numpy_helper.from_array(cut, f"edgec_cut_scales_{place}"))
    rows = helper.make_node("RowInt8", [node.input[0]], [f"edgec_row_int8_{place}"], domain="edgec.test")
    node.input[0], node.input[2] = rows.output[0], f"edgec_cut_scales_{place}"
    _leave_unrounded(node)
    graph.node.insert(place, rows)


def _constant(graph: onnx.GraphProto, name: str, folder: Path) -> np.ndarray:
    """Value of an initialiser, or of one behind a Cast."""
    for node in graph.node:
        if name in node.output:
            if node.op_type != "Cast":
                raise AssertionError(f"scales {name} come from a {node.op_type}, expected an initialiser or its Cast")
            name = node.input[0]
            break
    for tensor in graph.initializer:
        if tensor.name == name:
            return numpy_helper.to_array(tensor, str(folder))
    raise AssertionError(f"scales {name} are not an initialiser of the graph")


def _variant(model: Path, folder: Path, edit: Callable[[onnx.ModelProto], bool]) -> Path | None:
    """Write the edited model into `folder`, or return None when `edit` finds nothing to do.

    External data is copied: onnxruntime refuses links that lead out of the model's folder, onnx refuses hard links.
    """
    proto = onnx.load(model, load_external_data=False)
    if not edit(proto):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    entries = (entry for tensor in proto.graph.initializer for entry in tensor.external_data)
    for name in {entry.value for entry in entries if entry.key == "location"}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model.parent / name, folder / name)
    onnx.save(proto, folder / model.name)
    return folder / model.name
