"""An untrusted GGUF file in, its metadata and tensor infos out. Nothing is executed, no tensor is read.

gguf-py's `GGUFReader` was turned down for files that edgec did not write: it loops over counts before it holds them
against the file (49 bytes that announce 2³⁰ array elements keep it busy for minutes) and lets tensors overlap. Here
every count is checked against the bytes that remain before anything is allocated or looped over, so time and memory
are bounded by `edgec.limits`, whatever the file claims. What llama.cpp's own reader refuses is refused as well
(tensors must follow one another without gaps, `gguf_init_from_file` in ggml/src/gguf.cpp).

Standard library and numpy only: the runtime, which has no torch, reads headers too.
"""

from __future__ import annotations

import math
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgec import limits
from edgec.errors import CheckpointError

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_NAME_BYTES = 63
"""Longest name of a tensor [bytes]: ggml's GGML_MAX_NAME without its terminator."""

BLOCKS: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
"""ggml's type number → (name, elements per block, bytes per block)."""

_SCALARS: Mapping[int, Any] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_UINT32 = 4
_LEAST_PAIR = 8 + 1 + 4 + 1
_LEAST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8
_BUFFER = 1 << 20

Value = bool | int | float | str | list[str] | NDArray[Any]
"""Of a metadata key. Arrays of numbers are numpy arrays [N] of the stored type; arrays of strings are lists."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor. shape: as numpy and torch write it, outermost first: a weight is (out, in), blocks run along `in`.

    type: ggml's number, a key of `BLOCKS`. offset: of its first byte in the file. nbytes: without padding.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int

    @property
    def type_name(self) -> str:
        return BLOCKS[self.type][0]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """All that a GGUF file says about itself. tensors: by name, in the file's order; data_start: byte offset."""

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, Value] = field(repr=False)
    tensors: Mapping[str, GgufTensor] = field(repr=False)
    data_start: int

    @property
    def architecture(self) -> str:
        """general.architecture, e.g. "llama". Raises CheckpointError where there is none."""
        return self.text("general.architecture")

    def text(self, key: str, default: str | None = None) -> str:
        """A string. Raises CheckpointError where it is missing (and there is no default) or something else."""
        value = self._value(key, default)
        if not isinstance(value, str):
            self._wrong(key, "text", value)
        return value

    def integer(self, key: str, default: int | None = None, *, low: int = 0, high: int = limits.MAX_DIMENSION) -> int:
        """A whole number from low to high. Raises CheckpointError."""
        value = self._value(key, default)
        if type(value) is not int or not low <= value <= high:
            self._wrong(key, f"a whole number from {low} to {high}", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Raises CheckpointError."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self._wrong(key, "a finite number", value)
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            self._wrong(key, "true or false", value)
        return value

    def strings(self, key: str) -> list[str]:
        value = self._value(key, None)
        if not isinstance(value, list):
            self._wrong(key, "an array of strings", value)
        return value

    def numbers(self, key: str) -> NDArray[Any]:
        value = self._value(key, None)
        if not isinstance(value, np.ndarray):
            self._wrong(key, "an array of numbers", value)
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: the metadata lack {key!r}; write the file again with a current tool")
        return value

    def _wrong(self, key: str, expected: str, value: Any) -> NoReturn:
        raise CheckpointError(f"{self.path}: metadata {key!r}: expected {expected}, got {_short(value)}")


def is_gguf(path: Path) -> bool:
    """A regular file that starts like a GGUF, or is called one: its reader then says what is wrong with it."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            return path.suffix == ".gguf" or file.read(4) == MAGIC
    except OSError:
        return False


def read_header(path: Path | str) -> GgufHeader:
    """Metadata and tensor infos of a GGUF of version 2 or 3, little-endian.

    Raises CheckpointError naming the file and what is wrong with it: lying counts, nested arrays, duplicates, bad
    UTF-8, unknown types, wrapped products, gaps, overlaps, truncation.
    """
    path = Path(path)
    try:
        told = path.stat()
        if not stat.S_ISREG(told.st_mode):
            raise CheckpointError(f"{path}: not a regular file; expected a .gguf")
        with path.open("rb", buffering=_BUFFER) as file:
            return _Parser(path, file, told.st_size).header()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def tensor_bytes(header: GgufHeader, name: str) -> NDArray[np.uint8]:
    """The stored bytes of one tensor, [nbytes] uint8, read-only and memory-mapped."""
    info = header.tensors[name]
    return np.memmap(header.path, mode="r", dtype=np.uint8, offset=info.offset, shape=(info.nbytes,))


class _Parser:
    """Reads forwards, and knows at each step how many bytes there still are."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self._at = 0
        self._strings = 0

    def header(self) -> GgufHeader:
        if self._size < 24 or self._take(4, "magic") != MAGIC:
            self._refuse('not a GGUF file (it does not start with "GGUF")')
        version = self._u32("version")
        if version & 0xFFFF == 0:
            self._refuse("a big-endian GGUF; edgec reads little-endian ones")
        if version not in (2, 3):
            self._refuse(f"GGUF version {version}; edgec reads 2 and 3. Convert it with a current llama.cpp")
        count, pairs = self._u64("tensor count"), self._u64("metadata count")
        self._can_hold(count, _LEAST_TENSOR, "tensors")
        self._can_hold(pairs, _LEAST_PAIR, "metadata pairs")
        if count > limits.MAX_TENSORS:
            self._refuse(f"{count} tensors, at most {limits.MAX_TENSORS} are read")
        if pairs > limits.MAX_GGUF_PAIRS:
            self._refuse(f"{pairs} metadata pairs, at most {limits.MAX_GGUF_PAIRS} are read")
        metadata = self._metadata(pairs)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self._refuse(f"general.alignment is {_short(alignment)}, expected a power of two")
        claims = self._claims(count)
        start = _padded(self._at, alignment)
        return GgufHeader(self._path, version, alignment, metadata, self._placed(claims, start, alignment), start)

    def _metadata(self, pairs: int) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for _ in range(pairs):
            key = self._string("a metadata key", limits.MAX_GGUF_KEY_BYTES)
            if not key:
                self._refuse("a metadata key is empty")
            if key in found:
                self._refuse(f"metadata key {_short(key)} appears twice")
            kind = self._u32(f"type of {_short(key)}")
            found[key] = self._array(key) if kind == _ARRAY else self._scalar(key, kind)
        return found

    def _scalar(self, key: str, kind: int) -> Value:
        if kind == _STRING:
            return self._string(f"metadata {_short(key)}")
        value: Value = self._values(key, kind, 1)[0].item()
        return value

    def _array(self, key: str) -> Value:
        kind, count = self._u32(f"element type of {_short(key)}"), self._u64(f"length of {_short(key)}")
        if kind == _ARRAY:
            self._refuse(f"metadata {_short(key)} is an array of arrays; no model needs one")
        if kind != _STRING:
            return self._values(key, kind, count)
        self._can_hold(count, 8, f"strings in {_short(key)}")
        self._strings += count
        if self._strings > limits.MAX_GGUF_STRINGS:
            self._refuse(f"more than {limits.MAX_GGUF_STRINGS} strings in the metadata (in {_short(key)})")
        what = f"a string of {_short(key)}"
        return [self._string(what) for _ in range(count)]

    def _values(self, key: str, kind: int, count: int) -> NDArray[Any]:
        dtype = _SCALARS.get(kind)
        if dtype is None:
            self._refuse(f"metadata {_short(key)} is of unknown type {kind}")
        self._can_hold(count, dtype.itemsize, f"values in {_short(key)}")
        raw = self._take(count * dtype.itemsize, f"values of {_short(key)}")
        if kind == _BOOL and raw.strip(b"\x00\x01"):
            self._refuse(f"metadata {_short(key)} is a bool that is neither 0 nor 1")
        return np.frombuffer(raw, dtype)

    def _claims(self, count: int) -> list[tuple[str, tuple[int, ...], int, int, int]]:
        """(name, shape, type, relative offset, bytes) of every tensor; sizes are sound, places not yet checked."""
        claims, names = [], set()
        for _ in range(count):
            name = self._string("a tensor's name", MAX_NAME_BYTES)
            if not name:
                self._refuse("a tensor has no name")
            if name in names:
                self._refuse(f"tensor {name!r} is defined twice")
            names.add(name)
            axes = self._u32(f"axes of {name!r}")
            if not 1 <= axes <= 4:
                self._refuse(f"tensor {name!r} has {axes} axes; ggml has 1 to 4")
            sizes = struct.unpack(f"<{axes}Q", self._take(8 * axes, f"shape of {name!r}"))
            kind, offset = self._u32(f"type of {name!r}"), self._u64(f"offset of {name!r}")
            if kind not in BLOCKS:
                self._refuse(f"tensor {name!r} is of unknown type {kind}")
            label, block, stored = BLOCKS[kind]
            # Python's integers do not wrap; ggml's do, so a product beyond the file never gets that far.
            if 0 in sizes or math.prod(sizes) >= 1 << 48:
                self._refuse(f"tensor {name!r} has shape {list(reversed(sizes))}")
            if sizes[0] % block:
                self._refuse(f"tensor {name!r}: rows of {sizes[0]} do not divide into {label} blocks of {block}")
            claims.append((name, tuple(reversed(sizes)), kind, offset, math.prod(sizes) // block * stored))
        return claims

    def _placed(
        self, claims: list[tuple[str, tuple[int, ...], int, int, int]], start: int, alignment: int
    ) -> dict[str, GgufTensor]:
        """Each tensor must start where the one before it ends, padded: no gap, no overlap, nothing past the end."""
        tensors, expected = {}, 0
        for name, shape, kind, offset, nbytes in claims:
            if offset != expected:
                self._refuse(f"tensor {name!r} starts at data byte {offset}, expected {expected} (gap or overlap)")
            if start + offset + nbytes > self._size:
                self._refuse(
                    f"tensor {name!r} ({BLOCKS[kind][0]} {list(shape)}) needs bytes {start + offset} to "
                    f"{start + offset + nbytes}, the file has {self._size}; it is truncated or damaged"
                )
            tensors[name] = GgufTensor(name, shape, kind, start + offset, nbytes)
            expected = _padded(offset + nbytes, alignment)
        return tensors

    def _string(self, what: str, most: int = limits.MAX_GGUF_HEADER_BYTES) -> str:
        length = self._u64(f"length of {what}")
        if length > most:
            self._refuse(f"{what} claims {length} bytes, at most {most} are read")
        raw = self._take(length, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self._refuse(f"{what} is not UTF-8: {_short(raw)}")

    def _u32(self, what: str) -> int:
        return int.from_bytes(self._take(4, what), "little")

    def _u64(self, what: str) -> int:
        return int.from_bytes(self._take(8, what), "little")

    def _can_hold(self, count: int, least: int, what: str) -> None:
        if count * least > self._size - self._at:
            self._refuse(f"announces {count} {what}; the {self._size - self._at} bytes that remain cannot hold them")

    def _take(self, count: int, what: str) -> bytes:
        if count > self._size - self._at:
            self._refuse(f"truncated: {what} needs {count} bytes, {self._size - self._at} remain")
        if self._at + count > limits.MAX_GGUF_HEADER_BYTES:
            self._refuse(f"more than {limits.MAX_GGUF_HEADER_BYTES} bytes of metadata (at {what})")
        raw = self._file.read(count)
        if len(raw) != count:
            self._refuse(f"ended at {what}; the file changed while it was read")
        self._at += count
        return raw

    def _refuse(self, why: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: {why}")


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _short(value: Any) -> str:
    if isinstance(value, list | np.ndarray):
        return f"an array of {len(value)}"
    return repr(value[:80] if isinstance(value, str | bytes) else value)
