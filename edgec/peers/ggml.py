"""llama.cpp's quantization types through `ggml_quantize_chunk`, on the shared library inside llama-cpp-python.

The importance matrix is the diagonal of H, which is what llama-imatrix collects. K and IQ types come in super-blocks of
256 along a row; where a row is not a multiple of that, llama-quantize falls back to a type with blocks of 32, and
so does this file, by the table of llama.cpp's `tensor_type_fallback` (src/llama-quant.cpp), and says so: unannounced
fallbacks are what users complain about (llama.cpp #6614). One type for every layer is `llama-quantize --pure`; its
mixes (Q4_K_M) give layers more bits by their names and were turned down, since edgec's peers are uniform.

gguf-py was turned down for quantizing (it has no K or IQ quantizers) and for dequantizing (ggml's own `to_float` is
beside it in the same library, and is what llama.cpp computes with).
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.contraction import Contraction, MatMul
from edgec.errors import NumericsError, RuntimeUnavailableError
from edgec.fit import Factors
from edgec.moments import SecondMoment
from edgec.peers import Peer, Replacement
from edgec.records import Target

PLUGIN = True
FAMILY = "llama.cpp"

TYPES = (
    "Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_NL", "IQ4_XS", "Q4_0", "Q3_K", "IQ3_S", "IQ3_XXS",
    "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS",
)  # fmt: skip
"""Types that are tried, from most bits to fewest."""

TYPES_BELOW_TWO = ("IQ1_M", "IQ1_S")
"""Tried for budgets below 2 bits only: preparing their lattice takes ggml a minute."""

_NUMBERS = {
    "F16": 1, "Q4_0": 2, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
    "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22, "IQ4_XS": 23,
    "IQ1_M": 29,
}  # fmt: skip
"""`enum ggml_type`: GGUF files hold these numbers, so they never change."""

_FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""`tensor_type_fallback` of the llama.cpp inside llama-cpp-python 0.3.36; whatever does not fit either becomes F16."""

_NEEDS_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"})
"""Types that llama-quantize refuses without an importance matrix."""

_FLOOR = 1e-6
"""Least importance of a channel, as a share of the mean: the lattice searches of IQ types abort on a block of zeros."""

_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h, up to the field that is read."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _ToFloat),
    )


@dataclass(frozen=True, eq=False)
class _Type:
    number: int
    block: int
    to_float: Any


class Ggml:
    """The few functions of libggml-base that quantizing needs. Raises RuntimeUnavailableError for an unknown layout."""

    def __init__(self, path: Path) -> None:
        try:
            self._library: Any = ctypes.CDLL(str(path))
            self._declare()
            self._types = self._read_types()
        except (OSError, AttributeError) as error:
            raise RuntimeUnavailableError(f"{path}: not a ggml library that edgec can use ({error})") from error

    def _declare(self) -> None:
        lib = self._library
        lib.ggml_type_name.restype, lib.ggml_type_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
        lib.ggml_blck_size.restype, lib.ggml_blck_size.argtypes = ctypes.c_int64, [ctypes.c_int]
        lib.ggml_row_size.restype, lib.ggml_row_size.argtypes = ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]
        lib.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
        lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
        lib.ggml_quantize_chunk.restype = ctypes.c_size_t
        lib.ggml_quantize_chunk.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
            ctypes.c_void_p,
        ]  # fmt: skip

    def _read_types(self) -> dict[str, _Type]:
        """Only numbers that exist are asked for, since ggml reads past its table otherwise; each must be as known."""
        found = {}
        for name, number in _NUMBERS.items():
            traits = self._library.ggml_get_type_traits(number).contents
            told = self._library.ggml_type_name(number)
            same = traits.type_name == told and traits.blck_size == self._library.ggml_blck_size(number)
            if not same or told.upper() != name.encode() or not traits.to_float:
                raise AttributeError(f"its type {number} is not {name}, or its type traits have another layout")
            found[name] = _Type(number, int(traits.blck_size), traits.to_float)
        return found

    @property
    def blocks(self) -> dict[str, int]:
        """Type → numbers in one of its blocks."""
        return {name: found.block for name, found in self._types.items()}

    def quantize(
        self, weight: NDArray[Any], name: str, importance: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32], int]:
        """weight [n, k], importance [k] → (the values that the codes stand for, float32 [n, k]; stored bytes)."""
        if not np.isfinite(weight).all() or (importance is not None and not np.isfinite(importance).all()):
            raise NumericsError("the weight or its importance holds NaN or Inf")  # ggml would end the process
        n, k = weight.shape
        found = self._types[name]
        source = np.ascontiguousarray(weight, dtype=np.float32)
        codes = np.zeros(n * self._library.ggml_row_size(found.number, k), np.uint8)
        values = np.empty((n, k), np.float32)
        weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
        pointer = None if weights is None else weights.ctypes.data
        written = self._library.ggml_quantize_chunk(
            found.number, source.ctypes.data, codes.ctypes.data, 0, n, k, pointer
        )
        if written != codes.size:
            raise NumericsError(f"ggml wrote {written} bytes of {name}, expected {codes.size}")
        found.to_float(codes.ctypes.data, values.ctypes.data, n * k)
        return values, int(codes.size)


def real_type(wanted: str, width: int, blocks: Mapping[str, int]) -> str:
    """The type that llama-quantize would store rows of `width` numbers in. blocks: type → numbers in a block."""
    for name in (wanted, _FALLBACKS.get(wanted, "F16")):
        if name in blocks and width % blocks[name] == 0:
            return name
    return "F16"


@cache
def library() -> Ggml:
    """ggml as llama-cpp-python carries it. Raises RuntimeUnavailableError saying how to get it."""
    spec = importlib.util.find_spec("llama_cpp")  # found, not imported: the package itself loads much more
    if spec is None or spec.origin is None:
        raise RuntimeUnavailableError(
            "llama.cpp's types need llama-cpp-python: pip install llama-cpp-python (it compiles for some minutes)"
        )
    suffix = {"darwin": "dylib"}.get(sys.platform, "so")
    path = Path(spec.origin).parent / "lib" / f"libggml-base.{suffix}"
    if not path.is_file():
        raise RuntimeUnavailableError(f"{path}: not there; edgec reads ggml of llama-cpp-python 0.3.36 or later")
    return Ggml(path)


def peers(target: Target, bits: Sequence[float]) -> list[Peer]:
    """One per type, whatever the target: llama.cpp is a runtime of its own, and a user may choose it instead."""
    ggml = library()
    low = TYPES_BELOW_TWO if any(b < 2 for b in bits) else ()
    return [_peer(ggml, name) for name in (*TYPES, *low)]


def _peer(ggml: Ggml, wanted: str) -> Peer:
    def make(weight: NDArray[Any], moment: SecondMoment | None) -> Replacement:
        out, in_ = int(weight.shape[0]), int(weight.shape[1])
        importance = None if moment is None else _importance(moment)
        name = real_type(wanted, in_, ggml.blocks)
        if importance is None and name in _NEEDS_IMPORTANCE:
            raise RuntimeUnavailableError(f"{name} needs activations, and this layer has none")
        values, size = ggml.quantize(weight, name, None if name == "F16" else importance)
        factors = Factors(Contraction(out, in_, (MatMul("weight", out, in_),)), {"weight": values})
        form = name if name == wanted else f"{wanted}→{name}"
        return Replacement(factors, size, form, healable=False)

    return Peer(FAMILY, wanted, make, FAMILY)


def _importance(moment: SecondMoment) -> NDArray[np.float32]:
    diagonal = moment.diagonal
    mean = float(diagonal.mean())
    return np.maximum(diagonal, np.float32(_FLOOR * mean if mean > 0 else 1.0))
