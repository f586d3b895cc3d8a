"""ggml's own quantization types as core formats: names, bits and exact sizes, with nothing of ggml loaded.

`q4_k`, `iq3_xxs`, … as llama.cpp calls them. K and IQ types come in super-blocks of 256 along a row; a row that is not
a multiple of that is stored in the type that llama-quantize itself falls back to (`tensor_type_fallback` in
src/llama-quant.cpp of the llama.cpp in llama-cpp-python 0.3.36), and every size here is that of what is really stored:
silent fallbacks are what users complain about (llama.cpp #6614).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.errors import PlanError
from edgec.gguf_header import BLOCKS
from edgec.quantize.formats import CoreFormat, QuantizedTensor

NUMBERS = {name: number for number, (name, _, _) in BLOCKS.items()}
"""ggml's name of a type → `enum ggml_type`: GGUF files hold these numbers, so they never change."""

_SIZES = {name: (block, size) for name, block, size in BLOCKS.values()}

TYPES = (
    "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS",
    "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS",
)  # fmt: skip
"""Types that a plan may name, in lower case. Below two bits, preparing ggml's lattices takes a minute."""

EXACT: Mapping[str, str] = {"int4-b32": "Q4_0", "int8-b32": "Q8_0", "fp16": "F16", "fp32": "F32"}
"""Format of a core → the ggml type that holds exactly its numbers."""

_FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


def real_type(wanted: str, width: int) -> str:
    """The type that llama-quantize would store rows of `width` numbers in; F16 where nothing else divides them."""
    return next(
        (name for name in (wanted, _FALLBACKS.get(wanted, "F16")) if width % _SIZES[name][0] == 0),
        "F16",
    )


def row_bytes(kind: str, width: int) -> int:
    """Bytes of a row of `width` numbers, which the type's block must divide."""
    block, size = _SIZES[kind]
    return width // block * size


@dataclass(frozen=True)
class GgmlFormat(CoreFormat):
    """A ggml type by its name ("Q4_K"). bits: nominal, for comparing; block: numbers that share a super-block."""

    kind: str = ""

    @classmethod
    def named(cls, name: str) -> GgmlFormat | None:
        """From "q4_k"; None for what is no such type."""
        kind = name.upper()
        if kind not in TYPES or name != name.lower():
            return None
        bits = next(int(c) for c in kind if c.isdigit())
        return cls(bits=bits, block=_SIZES[kind][0], kind=kind)

    def __str__(self) -> str:
        return self.kind.lower()

    @property
    def simulated(self) -> bool:
        return False

    def divides(self, width: int) -> bool:
        """Are rows of this width stored in this very type?"""
        return width % self.block == 0

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a core of this shape, in the type that it is really stored in."""
        *rows, width = shape
        return math.prod(rows) * row_bytes(real_type(self.kind, width), width)


@dataclass(frozen=True, eq=False)
class GgmlTensor(QuantizedTensor):
    """A core in ggml's blocks. kind: the type that it is really stored in.

    codes: uint8 [n, row bytes], as a GGUF file holds them. scales: fp16 [n, 0]; they are inside the blocks.
    """

    kind: str = ""

    @classmethod
    def of(cls, fmt: GgmlFormat, shape: tuple[int, int], codes: NDArray[np.uint8]) -> GgmlTensor:
        """Raises PlanError when the bytes are not those of the shape."""
        n, k = shape
        kind = real_type(fmt.kind, k)
        if codes.shape != (n, row_bytes(kind, k)) or codes.dtype != np.uint8:
            raise PlanError(f"{codes.dtype} {codes.shape} does not hold {list(shape)} in {kind}")
        return cls(fmt, shape, codes, np.empty((n, 0), np.float16), None, kind)

    @cached_property
    def stored_bytes(self) -> int:
        return int(self.codes.size)

    def dequantize(self) -> NDArray[np.float32]:
        """float32 [n, k], by ggml's own code. Raises RuntimeUnavailableError where it is not installed."""
        from edgec.quantize import ggml  # the library is loaded when numbers are wanted, not before

        return ggml.library().dequantize(self.codes, self.kind, self.shape)

    def packed(self) -> NDArray[np.uint8]:
        """The blocks themselves, uint8 [n, 1, row bytes]."""
        return self.codes[:, None, :]

    def packed_zero_points(self) -> Any:
        return None
