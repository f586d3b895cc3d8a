"""One GGUF file from metadata and tensors: streamed, aligned, and the same bytes for the same input.

gguf-py's `GGUFWriter` lays the file out. Tensors are announced with their sizes first and produced one at a time while
the file is written, so that a model is never in memory as a whole.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.errors import ExportError
from edgec.export.gguf import import_gguf
from edgec.export.gguf.blocks import blocks, ggml_type
from edgec.export.gguf.metadata import Value
from edgec.fit import Core
from edgec.gguf_header import BLOCKS

ALIGNMENT = 32
"""Tensors start at multiples of this [bytes]; the format's default, enough to map and to read with AVX."""

FILE_TYPE = "general.file_type"
"""Metadata key: what a file mostly holds."""

MAX_NAME = 63
"""Longest tensor name that ggml reads [bytes]."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor to write.

    shape: as numpy has it, [out, in] (the file lists axes the other way round). type: ggml's name, "Q4_0", "F32".
    data: gives its bytes when they are written: uint8 [out, row bytes] for a quantised type, else the floats.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    data: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """As the type stores it. Raises ExportError when rows do not divide into its blocks."""
        block, size = block_of(self.type)
        if self.shape[-1] % block:
            raise ExportError(f"tensor {self.name!r}: rows of {self.shape[-1]} do not divide into {self.type}'s blocks")
        return math.prod(self.shape) // block * size


def block_of(kind: str) -> tuple[int, int]:
    """(numbers in a block, bytes of it) of a ggml type by its name, "Q6_K". Raises ExportError for an unknown one."""
    found = next(((block, size) for name, block, size in BLOCKS.values() if name == kind), None)
    if found is None:
        raise ExportError(f"ggml has no type {kind!r}")
    return found


def tensor_of(name: str, core: Core) -> GgufTensor:
    """A core under a name, in the type that holds exactly its numbers."""
    return GgufTensor(name, tuple(core.shape), ggml_type(core), lambda: blocks(core))


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[GgufTensor],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write `path`, which must lie in a folder that appears whole (edgec.outputs). Returns tensor → stored bytes.

    metadata needs "general.architecture"; an int is written as uint32, a float as float32, a list of ints as int32.
    What the file mostly holds is added to it, which llama.cpp would guess and Ollama shows.
    Raises ExportError for a tensor that has another shape or size than announced.
    """
    gguf = import_gguf()
    if len({t.name for t in tensors}) < len(tensors) or any(len(t.name.encode()) > MAX_NAME for t in tensors):
        raise ExportError(f"tensor names must differ and have at most {MAX_NAME} bytes")
    sizes = {tensor.name: tensor.nbytes for tensor in tensors}  # refuses an unknown type
    writer = gguf.GGUFWriter(path, str(metadata["general.architecture"]))
    try:
        for key, value in {**metadata, FILE_TYPE: file_type(tensors)}.items():
            if key != "general.architecture":
                _add(writer, key, value)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.type]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), sizes[tensor.name], raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(tensors):
            data = np.ascontiguousarray(tensor.data())
            if data.nbytes != sizes[tensor.name]:
                raise ExportError(f"tensor {tensor.name!r}: {data.nbytes} bytes, announced {sizes[tensor.name]}")
            writer.write_tensor_data(data)
            if progress:
                progress(done + 1, len(tensors))
    finally:
        writer.close()
    return sizes


def file_type(tensors: Sequence[GgufTensor]) -> int:
    """llama.cpp's number (`enum llama_ftype`) of the type that most numbers of the matrices have. A K type by itself is
    called the middle one of its mixtures, as llama.cpp does when it guesses.
    """
    held: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1:
            held[tensor.type] += math.prod(tensor.shape)
    (kind, _), *_ = held.most_common(1) or [("F32", 0)]
    names = import_gguf().LlamaFileType
    wanted = (f"MOSTLY_{kind}", f"MOSTLY_{kind}_M", f"ALL_{kind}")
    return int(next((names[name] for name in wanted if name in names.__members__), names.GUESSED))


def _add(writer: Any, key: str, value: Value) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            raise ExportError(f"metadata {key!r} cannot hold a {type(value).__name__}")
