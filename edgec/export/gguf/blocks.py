"""edgec's cores as ggml's blocks, and back: the same codes and scales in another order of bytes, no number changed.

| edgec    | ggml | a block of 32 along a row |
|----------|------|---------------------------|
| int4-b32 | Q4_0 | fp16 scale, 16 bytes: codes 0–15 in the low nibbles, 16–31 in the high ones; w = (q − 8)·d |
| int8-b32 | Q8_0 | fp16 scale, 32 signed bytes; w = q·d |
| q4_k, …  | Q4_K, … | as ggml made it |
| fp16, fp32 | F16, F32 | – |

So what GPTQ and healing made of a core ships exactly. Zero points (int4-b32-zp → Q4_1) were turned down: Q4_1 stores
the minimum as fp16, and scale × zero point takes up to 12 significant bits, one more than fp16 has.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.errors import ExportError
from edgec.fit import Core
from edgec.quantize.formats import CoreFormat, QuantizedTensor
from edgec.quantize.ggml_formats import EXACT, GgmlTensor, row_bytes

BLOCK = 32


def ggml_type(core: Core) -> str:
    """The type that a core is stored as. Raises ExportError for one that no type holds exactly."""
    if not isinstance(core, QuantizedTensor):
        if core.dtype not in (np.float16, np.float32):
            raise ExportError(f"a core of dtype {core.dtype}; GGUF cores are fp16 or fp32")
        return "F16" if core.dtype == np.float16 else "F32"
    if isinstance(core, GgmlTensor):
        return core.kind
    found = EXACT.get(str(core.fmt))
    if found is None or core.shape[1] % BLOCK or core.scales.dtype != np.float16:
        raise ExportError(
            f"a core of {core.fmt} {core.shape} with {core.scales.dtype} scales; GGUF holds exactly "
            f"{', '.join(EXACT)}, rows a multiple of {BLOCK} and fp16 scales"
        )
    return found


def blocks(core: Core) -> NDArray[Any]:
    """A core as the bytes of its type: uint8 [n, row bytes], or the floats themselves. Raises ExportError."""
    kind = ggml_type(core)
    if isinstance(core, GgmlTensor):
        return np.ascontiguousarray(core.codes)
    if not isinstance(core, QuantizedTensor):
        return np.ascontiguousarray(core)
    n, k = core.shape
    codes = core.codes.reshape(n, k // BLOCK, BLOCK)
    found = np.empty((n, k // BLOCK, row_bytes(kind, BLOCK)), np.uint8)
    found[:, :, :2] = np.ascontiguousarray(core.scales, "<f2").view(np.uint8).reshape(n, k // BLOCK, 2)
    if kind == "Q4_0":
        found[:, :, 2:] = codes[:, :, : BLOCK // 2] | (codes[:, :, BLOCK // 2 :] << 4)
    else:
        found[:, :, 2:] = codes ^ 0x80  # code − 128 as a signed byte
    return found.reshape(n, -1)


def core_of(data: NDArray[np.uint8], kind: str, shape: tuple[int, int]) -> QuantizedTensor:
    """Inverse of `blocks` for Q4_0 and Q8_0: uint8 [n, row bytes] → the core [n, k]."""
    n, k = shape
    raw = data.reshape(n, k // BLOCK, row_bytes(kind, BLOCK))
    scales = np.ascontiguousarray(raw[:, :, :2]).view("<f2").reshape(n, k // BLOCK).astype(np.float16)
    body = raw[:, :, 2:]
    codes = np.concatenate([body & 15, body >> 4], axis=2) if kind == "Q4_0" else body ^ 0x80
    fmt = CoreFormat.parse(next(name for name, known in EXACT.items() if known == kind))
    return QuantizedTensor(fmt, (n, k), np.ascontiguousarray(codes.reshape(n, k)), scales)
