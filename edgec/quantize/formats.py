"""Number formats of cores: plain floats and block-quantised integers with exact byte counts.

A quantised core [n, k] is cut into blocks along k; block j of row i holds integer codes and one scale:

    w = (code − zero) · scale        code in 0 … 2^bits − 1, zero = 2^(bits − 1) unless zero points are stored

which is `com.microsoft.MatMulNBits` exactly. Scales are stored as fp16 and cast to fp32 inside the graph:
onnxruntime folds the cast when the session is created and packs the weights as if the scales had been fp32
(measured: same speed), so a block of 32 costs half a bit per weight instead of one. Storing fp32 scales was
turned down for that reason.

Two formats are *simulated*: three bits (MatMulNBits refuses them) and fp8 e4m3 (Hopper-class GPUs only). Their values
and byte counts are exact, so that figures can show what they would buy, but nothing in edgec executes them: no target
offers them and they cannot be packed.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edgec.errors import NumericsError, PlanError

Array = NDArray[Any]

FAST_BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes with fast MatMulNBits kernels; 512 silently gave zeros (onnxruntime #28551)."""

BACKBONE = "backbone"
"""Name of the core that a layer's format may treat apart from the others."""

_FLOATS = {"fp32": 4, "fp16": 2}
_NAME = re.compile(r"int(2|3|4|8)-b(\d+)(-zp)?")
_FP8 = "fp8-e4m3"
_FP8_BLOCK = 128
"""Values that share a scale: the tile width of DeepSeek-V3's fp8 kernels (arXiv 2412.19437, §3.3.2)."""
_FP8_MAX = np.float32(448)
_FACTORS = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7), 2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)}
_FACTORS[3] = _FACTORS[4]
"""Bits → scales tried, as shares of the one that just covers the extremes."""
_FP16_MAX = 65504.0
_FP16_NORMAL_MIN = 2.0**-14
_FP32_NORMAL_MIN = 2.0**-126


class LayerFormat(ABC):
    """How the cores of one layer are stored, by name: a `CoreFormat` for all of them, or a `PairFormat`.

    A mapping from core names to formats was turned down: every plan would have to spell it out, and nothing
    but a backbone beside its correction has ever wanted two formats.
    """

    @classmethod
    def parse(cls, name: str) -> LayerFormat:
        """From "int8-b32" (every core) or "int2-b64+int8-b32" (the backbone, then every other). Raises PlanError."""
        first, plus, second = name.partition("+")
        backbone = CoreFormat.parse(first)
        if not plus:
            return backbone
        others = CoreFormat.parse(second)
        return backbone if others == backbone else PairFormat(backbone, others)

    @abstractmethod
    def of(self, core: str) -> CoreFormat:
        """The format of the core called so (one that a low-bit kernel takes; others are floats in any case)."""

    @property
    @abstractmethod
    def quantised(self) -> bool:
        """Is any core stored in codes and scales?"""

    @property
    @abstractmethod
    def simulated(self) -> bool:
        """Is any core in a format that no runtime of edgec executes: good for figures, not for files?"""


@dataclass(frozen=True)
class CoreFormat(LayerFormat):
    """How a core's numbers are stored. bits 32 or 16: plain floats; 2, 3, 4, 8: integers with one scale per `block`;
    8 with `fp8`: float8 e4m3 (the "fn" kind: no infinities, up to 448) in place of the integers.

    As a layer's format, it is that of every core.
    """

    bits: int
    block: int = 0
    zero_points: bool = False
    fp8: bool = False

    @classmethod
    def parse(cls, name: str) -> CoreFormat:
        """From a name such as "fp32", "int8-b32", "int4-b64-zp", "q4_k". Raises PlanError."""
        if name in _FLOATS:
            return cls(bits=8 * _FLOATS[name])
        if name == _FP8:
            return cls(bits=8, block=_FP8_BLOCK, fp8=True)
        from edgec.quantize.ggml_formats import GgmlFormat  # which is built on this class

        if (ggml := GgmlFormat.named(name)) is not None:
            return ggml
        match = _NAME.fullmatch(name)
        if not match or int(match[2]) not in FAST_BLOCKS:
            raise PlanError(
                f"unknown core format {name!r}; expected fp32, fp16, or int2|int4|int8 with -b16, -b32, -b64, -b128 "
                "or -b256, optionally followed by -zp (for example int4-b32), or a ggml type in small letters (q4_k, "
                "iq3_xxs; mixes such as Q4_K_M are what --budget is for); int3-… and fp8-e4m3 are simulated"
            )
        return cls(bits=int(match[1]), block=int(match[2]), zero_points=bool(match[3]))

    def __str__(self) -> str:
        if not self.block:
            return f"fp{self.bits}"
        if self.fp8:
            return _FP8
        return f"int{self.bits}-b{self.block}" + ("-zp" if self.zero_points else "")

    def of(self, core: str) -> CoreFormat:
        return self

    @property
    def quantised(self) -> bool:
        return self.block > 0

    @property
    def simulated(self) -> bool:
        return self.bits == 3 or self.fp8

    @property
    def zero(self) -> int:
        """The code that stands for 0.0 where no zero points are stored."""
        return 0 if self.fp8 else 1 << (self.bits - 1)

    def blocks(self, k: int) -> int:
        return -(-k // self.block)

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a core of this shape: codes, scales, zero points, padding of the last block."""
        if not self.quantised:
            return math.prod(shape) * self.bits // 8
        *rows, k = shape
        n, blocks = math.prod(rows), self.blocks(k)
        zero_points = n * -(-blocks * self.bits // 8) if self.zero_points else 0
        return n * blocks * (self.block * self.bits // 8 + 2) + zero_points


@dataclass(frozen=True)
class PairFormat(LayerFormat):
    """`backbone` for the core of that name (`BACKBONE`), `others` for every other quantisable core."""

    backbone: CoreFormat
    others: CoreFormat

    def __str__(self) -> str:
        return f"{self.backbone}+{self.others}"

    def of(self, core: str) -> CoreFormat:
        return self.backbone if core == BACKBONE else self.others

    @property
    def quantised(self) -> bool:
        return self.backbone.quantised or self.others.quantised

    @property
    def simulated(self) -> bool:
        return self.backbone.simulated or self.others.simulated


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantised core of `shape` (n, k).

    codes: uint8 [n, blocks·block], one code per byte (for fp8, its bits), the padding of the last block at zero's code.
    scales: fp16 [n, blocks] (fp32 where fp16 cannot hold them). zero_points: uint8 [n, blocks] or None.
    """

    fmt: CoreFormat
    shape: tuple[int, int]
    codes: NDArray[np.uint8]
    scales: Array
    zero_points: NDArray[np.uint8] | None = None

    @cached_property
    def stored_bytes(self) -> int:
        extra = self.scales.size * (self.scales.dtype.itemsize - 2)
        return self.fmt.stored_bytes(self.shape) + extra

    def dequantize(self) -> NDArray[np.float32]:
        """The values that the codes stand for, float32 [n, k]."""
        n, k = self.shape
        zero: Array | np.float32 = np.float32(self.fmt.zero)
        if self.zero_points is not None:
            zero = self.zero_points.astype(np.float32)[:, :, None]
        levels = self.codes.view(ml_dtypes.float8_e4m3fn) if self.fmt.fp8 else self.codes
        blocks = levels.reshape(n, -1, self.fmt.block).astype(np.float32)
        values = (blocks - zero) * self.scales.astype(np.float32)[:, :, None]
        return values.reshape(n, -1)[:, :k]

    def packed(self) -> NDArray[np.uint8]:
        """Codes as MatMulNBits stores them: uint8 [n, blocks, block·bits/8], earlier codes in the lower bits.

        Raises PlanError for a simulated format: what cannot be packed cannot be saved or exported.
        """
        if self.fmt.simulated:
            raise PlanError(
                f"{self.fmt} is simulated: its values and sizes are known, but no runtime executes it; plan with int2, "
                "int4 or int8 to save or export"
            )
        n = self.shape[0]
        return pack_bits(self.codes, self.fmt.bits).reshape(n, -1, self.fmt.block * self.fmt.bits // 8)

    def packed_zero_points(self) -> NDArray[np.uint8] | None:
        """Zero points as MatMulNBits stores them: uint8 [n, ⌈blocks·bits/8⌉]."""
        return None if self.zero_points is None else pack_bits(self.zero_points, self.fmt.bits)


def pack_bits(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes [n, m] < 2^bits → bytes [n, ⌈m·bits/8⌉], earlier codes in the lower bits, the last byte zero-padded."""
    per_byte = 8 // bits
    n, m = codes.shape
    padded = np.zeros((n, -(-m // per_byte) * per_byte), np.uint8)
    padded[:, :m] = codes
    packed = np.zeros((n, padded.shape[1] // per_byte), np.uint8)
    for place in range(per_byte):
        packed |= padded[:, place::per_byte] << np.uint8(place * bits)
    return packed


def unpack_bits(packed: NDArray[np.uint8], bits: int, m: int) -> NDArray[np.uint8]:
    """Inverse of `pack_bits` for m codes a row."""
    per_byte = 8 // bits
    codes = np.empty((packed.shape[0], packed.shape[1] * per_byte), np.uint8)
    for place in range(per_byte):
        codes[:, place::per_byte] = (packed >> np.uint8(place * bits)) & np.uint8((1 << bits) - 1)
    return codes[:, :m]


def storable(values: Array) -> Array:
    """Floats as they will be stored: fp16, unless the largest overflows it or is so small that fp16 has no bits for it.

    fp32 then, with subnormal numbers set to zero.
    """
    largest = float(np.abs(values).max(initial=0.0))
    if largest == 0.0 or _FP16_NORMAL_MIN <= largest <= _FP16_MAX:
        return values.astype(np.float16)
    return np.where(np.abs(values) < _FP32_NORMAL_MIN, 0, values).astype(np.float32)


def storable_scales(scales: Array) -> Array:
    """`storable`, so that codes are computed against the values that the runtime will see. Raises NumericsError.

    Rounded to bfloat16's eight significant bits first: KleidiAI, onnxruntime's 4-bit kernels on arm64, cuts scales off
    to bfloat16, and codes fitted to coarser scales lose nothing measurable while codes read with other scales do.
    """
    if not np.isfinite(scales).all():
        raise NumericsError("a quantization scale is NaN or Inf; the weights or their statistics are not finite")
    return storable(scales.astype(ml_dtypes.bfloat16).astype(np.float32))


def block_grid(
    blocks: NDArray[np.float32], fmt: CoreFormat, importance: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and zero point of every block: blocks [..., block] → scales, zeros [...] (float32, zeros integral).

    The scale is searched on a short grid below the one that just covers the extremes, minimising the squared
    error weighted by `importance` [..., block] (broadcast; the diagonal of H): clipping a few extremes a little
    is nearly always better at 4 bits and below. The side of the asymmetric integer range is part of the search,
    as a signed scale.
    """
    if fmt.fp8:
        extreme = np.abs(blocks).max(axis=-1)
        bases = [(extreme / _FP8_MAX, extreme)]
    elif fmt.zero_points:
        low = np.minimum(blocks.min(axis=-1), 0.0)
        high = np.maximum(blocks.max(axis=-1), 0.0)
        bases = [((high - low) / np.float32((1 << fmt.bits) - 1), low)]
    else:
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], axis=-1)[..., 0]
        signs = (-1.0,) if fmt.bits > 2 else (-1.0, 1.0)
        bases = [(np.float32(sign) * extreme / np.float32(fmt.zero), extreme) for sign in signs]
    factors = _FACTORS[fmt.bits]
    best_error: Array | None = None
    scales = zeros = np.empty(0, np.float32)
    for base, low in bases:
        for factor in factors:
            scale = storable_scales(base * np.float32(factor)).astype(np.float32)
            zero = _zero(low * np.float32(factor), scale, fmt)
            with np.errstate(over="ignore"):  # an infinite error wins over nothing
                error = (blocks - _on_grid(blocks, scale, zero, fmt)) ** 2
                error = (error if importance is None else error * importance).sum(axis=-1)
            if best_error is None:
                best_error, scales, zeros = error, scale, zero
            else:
                better = error < best_error
                best_error = np.where(better, error, best_error)
                scales, zeros = np.where(better, scale, scales), np.where(better, zero, zeros)
    return scales, zeros


def _zero(low: NDArray[np.float32], scale: NDArray[np.float32], fmt: CoreFormat) -> NDArray[np.float32]:
    if not fmt.zero_points:
        return np.full(scale.shape, fmt.zero, np.float32)
    exact = np.divide(-low, scale, out=np.zeros_like(scale), where=scale != 0)
    zero: NDArray[np.float32] = np.clip(np.rint(exact), 0, (1 << fmt.bits) - 1).astype(np.float32)
    return zero


def _on_grid(
    blocks: NDArray[np.float32], scale: NDArray[np.float32], zero: NDArray[np.float32], fmt: CoreFormat
) -> NDArray[np.float32]:
    levels = encode(blocks, scale[..., None], zero[..., None], fmt)
    values: NDArray[np.float32] = (levels - zero[..., None]) * scale[..., None]
    return values


def encode(
    values: NDArray[np.float32], scale: NDArray[np.float32], zero: NDArray[np.float32], fmt: CoreFormat
) -> NDArray[np.float32]:
    """Nearest levels (as float32) of values on the grid, so that (level − zero) · scale comes closest to each: integer
    codes, or e4m3 numbers for fp8. A zero scale gives zero's level. Shapes broadcast.
    """
    return encoder(scale, zero, fmt)(values)


def encoder(
    scale: NDArray[np.float32], zero: NDArray[np.float32], fmt: CoreFormat
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """`encode` on one grid, for who encodes column after column on it."""
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    top = np.float32((1 << fmt.bits) - 1)

    def fp8(values: NDArray[np.float32]) -> NDArray[np.float32]:
        clipped = np.clip(values * inverse, -_FP8_MAX, _FP8_MAX)  # the cast makes NaN of what is too large
        return clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)  # and rounds to nearest even

    def integers(values: NDArray[np.float32]) -> NDArray[np.float32]:
        levels = values * inverse
        levels += zero
        np.rint(levels, out=levels)
        np.maximum(levels, 0, out=levels)  # not np.clip, whose own work takes longer than that on a column
        return np.minimum(levels, top, out=levels)

    return fp8 if fmt.fp8 else integers


def stored_codes(levels: NDArray[np.float32], fmt: CoreFormat) -> NDArray[np.uint8]:
    """Levels of `encode` as the bytes of `QuantizedTensor.codes`."""
    return levels.astype(ml_dtypes.float8_e4m3fn).view(np.uint8) if fmt.fp8 else levels.astype(np.uint8)


def pad_blocks(core: Array, fmt: CoreFormat) -> NDArray[np.float32]:
    """core [n, k] → float32 [n, blocks, block], the last block padded with zeros."""
    n, k = core.shape
    padded = np.zeros((n, fmt.blocks(k) * fmt.block), np.float32)
    padded[:, :k] = core
    return padded.reshape(n, -1, fmt.block)
