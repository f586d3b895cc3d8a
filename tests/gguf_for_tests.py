"""Hand-made GGUF bytes: sound ones and every kind of lie (gguf-py refuses to write the lies)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_PACK = {U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B"}
_PACK |= {U64: "<Q", I64: "<q", F64: "<d"}


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def scalar(kind: int, value: Any) -> bytes:
    return text(value) if kind == STRING else struct.pack(_PACK[kind], value)


def pair(key: str | bytes, kind: int, value: Any) -> bytes:
    return text(key) + struct.pack("<I", kind) + scalar(kind, value)


def array(key: str, kind: int, values: Sequence[Any], count: int | None = None) -> bytes:
    head = struct.pack("<IIQ", ARRAY, kind, len(values) if count is None else count)
    return text(key) + head + b"".join(scalar(kind, v) for v in values)


def info(name: str | bytes, sizes: Sequence[int], kind: int = 0, offset: int = 0, axes: int | None = None) -> bytes:
    """sizes: as ggml writes them, innermost first."""
    packed = struct.pack(f"<{len(sizes)}Q", *sizes)
    return (
        text(name) + struct.pack("<I", len(sizes) if axes is None else axes) + packed + struct.pack("<IQ", kind, offset)
    )


def gguf(
    pairs: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    tensors: int | None = None,
    metadata: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = (len(infos) if tensors is None else tensors, len(pairs) if metadata is None else metadata)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data
