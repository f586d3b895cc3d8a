"""A copy of a GGUF file with every tensor in F32: the same numbers, with no kernel that rounds activations.

It is what wiring is checked on: a product with a quantised matrix rounds its inputs to 8 bits in llama.cpp, which hides
a small mistake.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.export.gguf.metadata import Value
from edgec.export.gguf.writer import GgufTensor, write_gguf
from edgec.gguf_header import GgufHeader, read_header, tensor_bytes
from edgec.quantize import ggml


def copy_in_floats(source: Path, out: Path) -> None:
    """Write `out`. Raises CheckpointError when the header of `source` is unsound."""
    header = read_header(source)
    metadata: dict[str, Value] = {
        key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in header.metadata.items()
    }
    write_gguf(out, metadata, [_floats(header, name) for name in header.tensors])


def values_of(header: GgufHeader, name: str) -> NDArray[np.float32]:
    """One tensor as the numbers that it stands for, float32 in its shape."""
    info = header.tensors[name]
    raw = tensor_bytes(header, name)
    if info.type_name == "F32":
        return raw.view("<f4").reshape(info.shape).astype(np.float32)
    rows = info.elements // info.shape[-1]
    codes: Any = raw.reshape(rows, -1)
    return ggml.library().dequantize(codes, info.type_name, (rows, info.shape[-1])).reshape(info.shape)


def _floats(header: GgufHeader, name: str) -> GgufTensor:
    return GgufTensor(name, header.tensors[name].shape, "F32", lambda: values_of(header, name))
