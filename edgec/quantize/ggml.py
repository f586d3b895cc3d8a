"""ggml's own quantizers through `ggml_quantize_chunk`, on the shared library inside llama-cpp-python.

The importance matrix is the diagonal of H, which is what llama-imatrix collects. gguf-py was turned down for
quantizing (it has no K or IQ quantizers) and for dequantizing (ggml's own `to_float` is beside it in the same library,
and is what llama.cpp computes with).
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.errors import NumericsError, RuntimeUnavailableError
from edgec.moments import SecondMoment
from edgec.quantize.ggml_formats import NUMBERS, GgmlFormat, GgmlTensor, real_type

logger = logging.getLogger(__name__)

_USED = (
    "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ2_XS",
    "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "IQ1_M",
)  # fmt: skip

_NEEDS_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"})
"""Types that llama-quantize refuses without an importance matrix."""

_FLOOR = 1e-6
"""Least importance of a channel, as a share of the mean: the lattice searches of IQ types abort on a block of zeros."""

_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


def quantize(core: NDArray[Any], fmt: GgmlFormat, second_moment: SecondMoment | None = None) -> GgmlTensor:
    """core [n, k] → GgmlTensor, its importance the diagonal of the moment; without one, every channel counts alike.

    Rows that the type's blocks do not divide are stored as llama-quantize would store them, and a line says so.
    """
    n, k = int(core.shape[0]), int(core.shape[1])
    kind = real_type(fmt.kind, k)
    if kind != fmt.kind:
        bits = 8 * fmt.stored_bytes((1, k)) / k
        logger.warning("rows of %d do not divide into %s; stored as %s, %.4g bits per weight", k, fmt, kind, bits)
    importance = None if second_moment is None else importance_of(second_moment)
    if importance is None and kind in _NEEDS_IMPORTANCE:
        importance = np.ones(k, np.float32)
    return GgmlTensor.of(fmt, (n, k), library().quantize(core, kind, importance))


def importance_of(moment: SecondMoment) -> NDArray[np.float32]:
    """Mean square of every input channel, float32 [k], none of them zero."""
    diagonal = moment.diagonal
    mean = float(diagonal.mean())
    return np.maximum(diagonal, np.float32(_FLOOR * mean if mean > 0 else 1.0))


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
        for name in _USED:
            number = NUMBERS[name]
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

    def quantize(self, weight: NDArray[Any], name: str, importance: NDArray[np.float32] | None) -> NDArray[np.uint8]:
        """weight [n, k], importance [k] → blocks of the type, uint8 [n, row bytes]. Raises NumericsError."""
        if not np.isfinite(weight).all() or (importance is not None and not np.isfinite(importance).all()):
            raise NumericsError("the weight or its importance holds NaN or Inf")  # ggml would end the process
        n, k = weight.shape
        if importance is not None and importance.shape != (k,):
            raise NumericsError(f"an importance of {importance.shape} for rows of {k}; profile the model again")
        found = self._types[name]
        source = np.ascontiguousarray(weight, dtype=np.float32)
        row = int(self._library.ggml_row_size(found.number, k))
        codes = np.zeros((n, row), np.uint8)
        weights = None if importance is None or name == "F16" else np.ascontiguousarray(importance, dtype=np.float32)
        pointer = None if weights is None else weights.ctypes.data
        written = self._library.ggml_quantize_chunk(
            found.number, source.ctypes.data, codes.ctypes.data, 0, n, k, pointer
        )
        if written != codes.size:
            raise NumericsError(f"ggml wrote {written} bytes of {name}, expected {codes.size}")
        return codes

    def dequantize(self, codes: NDArray[np.uint8], name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
        """Blocks [n, row bytes] → the values that they stand for, float32 [n, k]."""
        n, k = shape
        source, values = np.ascontiguousarray(codes), np.empty((n, k), np.float32)
        if source.size != n * int(self._library.ggml_row_size(self._types[name].number, k)):
            raise NumericsError(f"{source.size} bytes do not hold {list(shape)} in {name}")
        self._types[name].to_float(source.ctypes.data, values.ctypes.data, n * k)
        return values


@cache
def library() -> Ggml:
    """ggml as llama-cpp-python carries it. Raises RuntimeUnavailableError saying how to get it."""
    spec = importlib.util.find_spec("llama_cpp")  # found, not imported: the package itself loads much more
    if spec is None or spec.origin is None:
        raise RuntimeUnavailableError(
            "ggml's types need llama-cpp-python: pip install 'edgec[gguf]' (it compiles for some minutes)"
        )
    suffix = {"darwin": "dylib"}.get(sys.platform, "so")
    path = Path(spec.origin).parent / "lib" / f"libggml-base.{suffix}"
    if not path.is_file():
        raise RuntimeUnavailableError(f"{path}: not there; edgec reads ggml of llama-cpp-python 0.3.36 or later")
    return Ggml(path)
