"""Block formats: names, exact byte counts, packing, scales that fp16 cannot hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgec.errors import NumericsError, PlanError
from edgec.fit import fit
from edgec.quantize import rtn
from edgec.quantize.formats import FAST_BLOCKS, CoreFormat, pack_bits, storable, unpack_bits
from edgec.records import Spec

ALL = [f"int{bits}-b{block}{zp}" for bits in (2, 4, 8) for block in FAST_BLOCKS for zp in ("", "-zp")]


def core_of(n: int, k: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


@pytest.mark.parametrize("name", [*ALL, "fp32", "fp16"])
def test_names_round_trip(name: str) -> None:
    assert str(CoreFormat.parse(name)) == name


@pytest.mark.parametrize(
    "name", ["", "int3-b32", "int4", "int4-b512", "int4-b31", "INT4-b32", "int4-b32-zp ", "bf16", "int4-b-32", "fp64"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(PlanError, match="unknown core format"):
        CoreFormat.parse(name)


@given(
    bits=st.sampled_from([2, 4, 8]),
    n=st.integers(1, 5),
    m=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_packing_round_trips(bits: int, n: int, m: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (n, m)).astype(np.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (n, -(-m * bits // 8))
    np.testing.assert_array_equal(unpack_bits(packed, bits, m), codes)


def test_earlier_codes_are_in_the_lower_bits() -> None:
    assert pack_bits(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]
    assert pack_bits(np.array([[1, 2, 3, 0, 1]], np.uint8), 2).tolist() == [[0b00111001, 0b01]]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("k", [1, 31, 64, 257])
def test_byte_counts_are_those_of_the_packed_arrays(name: str, k: int) -> None:
    fmt, core = CoreFormat.parse(name), core_of(3, k)
    stored = rtn.quantize(core, fmt)
    zero_points = stored.packed_zero_points()
    packed = [stored.packed(), stored.scales, *([] if zero_points is None else [zero_points])]
    assert stored.packed().shape == (3, fmt.blocks(k), fmt.block * fmt.bits // 8)
    assert fmt.stored_bytes(core.shape) == stored.stored_bytes == sum(a.nbytes for a in packed)
    assert stored.dequantize().shape == core.shape


@pytest.mark.parametrize("name", ["int8-b32", "int4-b32-zp", "int2-b64"])
def test_scales_survive_a_cut_to_bfloat16(name: str) -> None:
    """What KleidiAI's 4-bit kernels on arm64 do to them."""
    scales = rtn.quantize(core_of(8, 128), CoreFormat.parse(name)).scales.astype(np.float32)
    assert ((scales.view(np.uint32) & 0xFFFF) == 0).all()


def test_padding_holds_the_code_of_zero() -> None:
    stored = rtn.quantize(core_of(3, 40), CoreFormat.parse("int4-b32"))
    assert (stored.codes[:, 40:] == 8).all()


@pytest.mark.parametrize("name", ["int8-b32", "int4-b32", "int2-b32", "int4-b32-zp"])
@pytest.mark.parametrize(("size", "dtype"), [(1.0, "float16"), (1e9, "float32"), (1e-9, "float32")])
def test_scales_that_fp16_cannot_hold_are_stored_as_fp32(name: str, size: float, dtype: str) -> None:
    core = core_of(4, 64) * np.float32(size)
    stored = rtn.quantize(core, CoreFormat.parse(name))
    assert stored.scales.dtype == dtype
    extra = stored.scales.size * (stored.scales.itemsize - 2)
    assert stored.stored_bytes == stored.fmt.stored_bytes(core.shape) + extra
    relative = np.linalg.norm(stored.dequantize() - core) / np.linalg.norm(core)
    assert relative < {"8": 0.01, "4": 0.12, "2": 0.6}[name[3]]


@pytest.mark.parametrize("name", ["int8-b16", "int4-b16", "int2-b16", "int4-b16-zp"])
@pytest.mark.parametrize("size", [1e-44, 1e-40, 1e-38, 1e-36, 1e20, 1e37])
def test_extreme_cores_stay_finite(name: str, size: float) -> None:
    core = core_of(2, 16)
    core *= np.float32(size / np.abs(core).max())
    found = rtn.quantize(core, CoreFormat.parse(name)).dequantize()
    assert np.isfinite(found).all()
    assert (np.abs(found - core) <= max(0.5 * size, 1e-35)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_cores_that_are_not_finite_are_refused(bad: float) -> None:
    core = core_of(2, 64)
    core[1, 40] = bad
    for name in ("int8-b32", "int4-b32", "int4-b32-zp"):
        with pytest.raises(NumericsError), np.errstate(invalid="ignore"):
            rtn.quantize(core, CoreFormat.parse(name))


def test_fp16_cores_that_would_overflow_or_vanish_stay_fp32() -> None:
    for size, dtype in [(1.0, np.float16), (1e6, np.float32), (1e-12, np.float32)]:
        weight = core_of(8, 8) * np.float32(size)
        factors = fit(weight, Spec("dense"), CoreFormat.parse("fp16"))
        assert factors.cores["weight"].dtype == dtype  # type: ignore[union-attr]
        np.testing.assert_allclose(factors.dense(), weight, rtol=1e-3, atol=1e-3 * size)


def test_storable_flushes_what_is_subnormal_in_fp32() -> None:
    assert storable(np.array([1e-40, 1e-20], np.float32)).tolist() == [0.0, np.float32(1e-20)]
    assert storable(np.zeros(3, np.float32)).dtype == np.float16
