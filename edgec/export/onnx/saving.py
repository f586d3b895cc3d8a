"""model.onnx and model.onnx.data: the graph and its weights, equal tensors stored once.

Written here rather than by onnx_ir's own writer because a tied head and embedding must share their bytes: the
same range of the data file serves the 3-D layout that MatMulNBits wants and the 2-D one of GatherBlockQuantized,
which onnxruntime maps twice at no cost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"

_PAGE = 4096
"""Offset alignment of tensors from _LARGE on [bytes]: what some systems need to map a tensor instead of reading it."""
_LARGE = 1 << 20
"""Tensors from this size on start on a page [bytes], onnx's own threshold. Aligning all of them cost MiniLM 1.3 %."""
_LINE = 64
"""Offset alignment of the others [bytes]: a cache line, the most that a kernel asks for."""
_SMALL = 1024
"""Tensors up to this size stay inside model.onnx [bytes]."""


def save_model(model: ir.Model, folder: Path, progress: Callable[[int, int], None] | None = None) -> dict[str, int]:
    """Write both files into `folder` (no data file when nothing is large).

    Returns initializer name → stored bytes; of those that share their bytes, all but the first count 0.
    """
    sizes: dict[str, int] = {}
    places: dict[str, tuple[int, int]] = {}
    external: dict[str, ir.ExternalTensor] = {}
    values = [(name, v) for name, v in model.graph.initializers.items() if v.const_value is not None]
    with (folder / DATA_FILE).open("wb") as data:
        for done, (name, value) in enumerate(values):
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes <= _SMALL or tensor.dtype == ir.DataType.STRING:
                sizes[name] = tensor.nbytes
                continue
            raw = tensor.tobytes()
            digest = hashlib.sha256(raw).hexdigest()
            if digest not in places:
                data.seek(-data.tell() % (_PAGE if len(raw) >= _LARGE else _LINE), 1)
                places[digest] = (data.tell(), len(raw))
                data.write(raw)
                sizes[name] = len(raw)
            else:
                sizes[name] = 0
            offset, length = places[digest]
            external[name] = ir.ExternalTensor(
                DATA_FILE,
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
                base_dir=folder,
            )
            if progress:
                progress(done + 1, len(values))
    if not external:
        (folder / DATA_FILE).unlink()
    kept = {name: value.const_value for name, value in values}
    try:
        for name, tensor in external.items():
            model.graph.initializers[name].const_value = tensor
        ir.save(model, folder / MODEL_FILE)
    finally:
        for name in external:
            model.graph.initializers[name].const_value = kept[name]
    return sizes
