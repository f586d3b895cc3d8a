"""Block formats: names, exact byte counts, packing, scales that fp16 cannot hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec.errors import NumericsError, PlanError
from edgec.fit import fit, stored_bytes
from edgec.quantize import rtn
from edgec.quantize.formats import (
    FAST_BLOCKS,
    CoreFormat,
    LayerFormat,
    PairFormat,
    pack_bits,
    storable,
    unpack_bits,
)
from edgec.records import Spec

ALL = [f"int{bits}-b{block}{zp}" for bits in (2, 4, 8) for block in FAST_BLOCKS for zp in ("", "-zp")]
SIMULATED = [f"int3-b{block}" for block in FAST_BLOCKS] + ["fp8-e4m3"]


def core_of(n: int, k: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


@pytest.mark.parametrize("name", [*ALL, *SIMULATED, "fp32", "fp16"])
def test_names_round_trip(name: str) -> None:
    assert str(CoreFormat.parse(name)) == name


@pytest.mark.parametrize(
    "name",
    ["", "int3", "int5-b32", "fp8", "fp8-e4m3-b32", "int2-b32+int4-b32"]
    + ["int4", "int4-b512", "int4-b31", "INT4-b32", "int4-b32-zp ", "bf16", "int4-b-32", "fp64"],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(PlanError, match="unknown core format"):
        CoreFormat.parse(name)


def test_a_pair_treats_the_backbone_apart() -> None:
    pair = LayerFormat.parse("int2-b64+int8-b32")
    assert pair == PairFormat(CoreFormat(2, 64), CoreFormat(8, 32))
    assert str(pair) == "int2-b64+int8-b32"
    assert (pair.of("backbone"), pair.of("core1"), pair.of("weight")) == (pair.backbone, pair.others, pair.others)
    assert pair.quantised and not pair.simulated
    assert LayerFormat.parse("int4-b32+fp16").quantised
    assert not LayerFormat.parse("fp32+fp16").quantised


def test_a_single_format_is_that_of_every_core() -> None:
    single = LayerFormat.parse("int4-b32")
    assert single == CoreFormat(4, 32) == LayerFormat.parse("int4-b32+int4-b32")
    assert single.of("backbone") == single.of("core1") == single


@pytest.mark.parametrize("name", ["int2-b64+", "+int4-b32", "int2-b64+int4-b32+int8-b32", "int2-b64 + int4-b32"])
def test_other_pairs_are_refused(name: str) -> None:
    with pytest.raises(PlanError, match="unknown core format"):
        LayerFormat.parse(name)


def test_a_pair_without_a_backbone_is_refused() -> None:
    pair = LayerFormat.parse("int2-b64+int8-b32")
    for spec in (Spec("dense"), Spec("svd", (4,))):
        with pytest.raises(PlanError, match="no core called 'backbone'"):
            fit(core_of(8, 64), spec, pair)
        with pytest.raises(PlanError, match="no core called 'backbone'"):
            stored_bytes(spec, (8, 64), "linear", pair)


def slow_e4m3() -> np.ndarray[Any, Any]:
    """Every finite number of the format (OCP 8-bit floating point, §5.1) by its byte: sign, 4 bits of exponent with
    bias 7, 3 of mantissa; NaN where exponent and mantissa are all ones."""
    values = np.full(256, np.nan)
    for byte in range(256):
        sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
        if (exponent, mantissa) != (15, 7):
            size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
            values[byte] = -size if sign else size
    return values


def slow_nearest(value: float) -> int:
    """The byte of the nearest finite number, of two the one with an even mantissa; zero keeps its sign."""
    values = slow_e4m3()
    distance = np.abs(values - value)
    near = [int(b) for b in np.flatnonzero(distance == np.nanmin(distance))]
    signed = [b for b in near if (b >> 7) == int(np.signbit(value))] or near
    return min(signed, key=lambda b: b & 1)


@pytest.mark.parametrize("k", [1, 128, 300])
def test_fp8_is_the_nearest_number_bit_for_bit(k: int) -> None:
    core = core_of(4, k) * np.float32(3)
    core[0] = 0
    core[1] *= np.exp(-np.arange(k) / 20)  # down into the subnormal numbers
    stored = rtn.quantize(core, CoreFormat.parse("fp8-e4m3"))
    padded = np.zeros((4, stored.codes.shape[1]), np.float32)
    padded[:, :k] = core
    for row in range(4):
        for column in range(padded.shape[1]):
            scale = stored.scales[row, column // 128].astype(np.float32)
            level = np.float32(padded[row, column]) * (np.float32(1) / scale) if scale else np.float32(0)
            level = np.clip(level, -448, 448)
            assert stored.codes[row, column] == slow_nearest(float(level)), (row, column, level)
            if column < k:
                assert stored.dequantize()[row, column] == np.float32(slow_e4m3()[stored.codes[row, column]]) * scale
    extremes = np.abs(core).max(1) / 448 if k <= 128 else None
    if extremes is not None:
        np.testing.assert_allclose(stored.scales[:, 0].astype(np.float32), extremes, rtol=2**-8)


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 200), block=st.sampled_from(FAST_BLOCKS), seed=st.integers(0, 1000))
def test_three_bits_are_the_nearest_code_bit_for_bit(k: int, block: int, seed: int) -> None:
    core = core_of(2, k, seed)
    stored = rtn.quantize(core, CoreFormat(3, block))
    assert stored.codes.max() <= 7
    for row in range(2):
        for column in range(k):
            scale = stored.scales[row, column // block].astype(np.float32)
            level = core[row, column] * (np.float32(1) / scale) + np.float32(4)
            code = min(max(round(float(level)), 0), 7)
            assert stored.codes[row, column] == code
            assert stored.dequantize()[row, column] == np.float32(code - 4) * scale


@pytest.mark.parametrize(
    ("name", "shape", "size", "bits"),
    [
        ("int3-b32", (3, 100), 3 * 4 * (12 + 2), 3.5),
        ("int3-b64", (2, 128), 2 * 2 * (24 + 2), 3.25),
        ("fp8-e4m3", (3, 100), 3 * (128 + 2), 8.125),
    ],
)
def test_simulated_bytes_are_counted_as_if_packed(name: str, shape: tuple[int, int], size: int, bits: float) -> None:
    fmt = CoreFormat.parse(name)
    assert fmt.stored_bytes(shape) == rtn.quantize(core_of(*shape), fmt).stored_bytes == size
    assert 8 * fmt.stored_bytes((16, 1024)) / (16 * 1024) == bits


@pytest.mark.parametrize("name", SIMULATED)
def test_simulated_formats_say_so_and_cannot_be_packed(name: str) -> None:
    fmt = CoreFormat.parse(name)
    assert fmt.simulated and fmt.quantised
    assert LayerFormat.parse(f"{name}+int4-b32").simulated
    with pytest.raises(PlanError, match=f"{name} is simulated"):
        rtn.quantize(core_of(2, 64), fmt).packed()


def test_executed_formats_are_not_simulated() -> None:
    assert not any(CoreFormat.parse(name).simulated for name in [*ALL, "fp32", "fp16"])


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


@pytest.mark.parametrize("name", ["int8-b16", "int4-b16", "int2-b16", "int4-b16-zp", "int3-b16", "fp8-e4m3"])
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
    for name in ("int8-b32", "int4-b32", "int4-b32-zp", "int3-b32", "fp8-e4m3"):
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
