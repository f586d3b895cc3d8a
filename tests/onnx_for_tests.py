"""What an exported model.onnx really holds: read with onnx alone, so that nothing of edgec's own is believed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx import helper, numpy_helper


@dataclass(frozen=True)
class Stored:
    """One initialiser: shape, bytes, and its range in the external file (None: inside model.onnx)."""

    shape: tuple[int, ...]
    dtype: int
    bytes: int
    place: tuple[int, int] | None


def load(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx", load_external_data=False)


def stored(folder: Path) -> dict[str, Stored]:
    """Every initialiser by name."""
    found = {}
    for tensor in load(folder).graph.initializer:
        external = {entry.key: entry.value for entry in tensor.external_data}
        place = (int(external["offset"]), int(external["length"])) if external else None
        size = place[1] if place else numpy_helper.to_array(tensor).nbytes
        found[tensor.name] = Stored(tuple(tensor.dims), tensor.data_type, size, place)
    return found


def layer_bytes(folder: Path, layers: list[str]) -> int:
    """Bytes of codes, scales and cores that the named layers store; a range that two of them share counts once."""
    ranges: dict[Any, int] = {}
    for name, tensor in stored(folder).items():
        if name.endswith((".rows", ".strong", ".smooth", ".inverse")):  # what int8 products have beside the cores
            continue
        if tensor.dtype != onnx.TensorProto.INT64 and any(name.startswith(f"{layer}/") for layer in layers):
            ranges[tensor.place or name] = tensor.bytes
    return sum(ranges.values())


def nodes(folder: Path, kind: str, prefix: str = "") -> list[dict[str, Any]]:
    """Attributes of every node of one kind whose name starts so, with the name under "name"."""
    return [
        {"name": node.name, **{entry.name: helper.get_attribute_value(entry) for entry in node.attribute}}
        for node in load(folder).graph.node
        if node.op_type == kind and node.name.startswith(prefix)
    ]


def optimised(folder: Path, work: Path) -> onnx.ModelProto:
    """The graph as onnxruntime executes it, after its own rewriting."""
    shutil.copytree(folder, work / "copy")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(work / "copy" / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(work / "copy" / "model.onnx", options, providers=["CPUExecutionProvider"])
    return onnx.load(work / "copy" / "optimised.onnx")


def shapes(model: onnx.ModelProto) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all constants, and of all values whose shape is fixed."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in model.graph.initializer:
        yield tensor.name, tuple(tensor.dims)
    inferred = onnx.shape_inference.infer_shapes(model)
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            yield value.name, tuple(dim.dim_value for dim in dims)
