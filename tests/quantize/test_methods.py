"""RTN against brute force, GPTQ against RTN in the metric of the inputs, coordinate descent against GPTQ."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec.moments import DAMPING, SecondMoment
from edgec.quantize import descent, gptq, rtn
from edgec.quantize.formats import CoreFormat, QuantizedTensor

Array = np.ndarray[Any, Any]


def correlated(width: int, seed: int, samples: int | None = None) -> SecondMoment:
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((width, width)) * np.exp(-np.arange(width) * 4 / width)
    x = generator.standard_normal((samples or 4 * width, width)) @ mixing.T
    return SecondMoment(x.T @ x / len(x))


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    zeros = (a.zero_points is None) == (b.zero_points is None)
    if a.zero_points is not None and b.zero_points is not None:
        zeros = bool((a.zero_points == b.zero_points).all())
    return zeros and bool((a.codes == b.codes).all()) and bool((a.scales == b.scales).all())


@pytest.mark.parametrize("name", ["int8-b16", "int4-b16", "int4-b16-zp", "int3-b16", "int2-b16", "int2-b16-zp"])
def test_every_code_is_the_nearest_on_its_grid(name: str) -> None:
    fmt = CoreFormat.parse(name)
    core = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    stored = rtn.quantize(core, fmt)
    for row, block in product(range(6), range(fmt.blocks(40))):
        zero = fmt.zero if stored.zero_points is None else int(stored.zero_points[row, block])
        grid = (np.arange(1 << fmt.bits) - zero) * float(stored.scales[row, block])
        values = core[row, block * 16 : (block + 1) * 16]
        nearest = np.abs(values[:, None] - grid[None]).min(axis=1)
        found = stored.dequantize()[row, block * 16 : (block + 1) * 16]
        np.testing.assert_allclose(np.abs(found - values), nearest, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "mean", "most"), [("int4-b16", 1.3, 4.0), ("int3-b16", 1.3, 4.0), ("int2-b16", 1.1, 1.6)]
)
def test_the_scale_search_comes_close_to_brute_force(name: str, mean: float, most: float) -> None:
    """Squared error against the best of 801 scales per block."""
    fmt = CoreFormat.parse(name)
    core = np.random.default_rng(1).standard_normal((40, 16)).astype(np.float32)
    found = ((rtn.quantize(core, fmt).dequantize() - core) ** 2).sum(1)
    best = np.full(40, np.inf)
    for share in np.linspace(-2, 2, 801):
        scale = share * np.abs(core).max(1, keepdims=True) / fmt.zero
        scale[scale == 0] = 1.0
        codes = np.clip(np.rint(core / scale) + fmt.zero, 0, (1 << fmt.bits) - 1)
        best = np.minimum(best, (((codes - fmt.zero) * scale - core) ** 2).sum(1))
    ratios = found / best
    assert ratios.mean() < mean
    assert ratios.max() < most


def test_zero_points_pay_on_one_sided_blocks() -> None:
    core = np.abs(np.random.default_rng(0).standard_normal((16, 64))).astype(np.float32) + 1
    errors = [
        np.linalg.norm(rtn.quantize(core, CoreFormat.parse(n)).dequantize() - core) for n in ("int4-b32", "int4-b32-zp")
    ]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("name", ["int4-b16", "int4-b16-zp"])
def test_zeros_stay_exactly_zero(name: str) -> None:
    core = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    core[:, ::3] = 0
    core[2] = 0
    found = rtn.quantize(core, CoreFormat.parse(name)).dequantize()
    assert (found[:, ::3] == 0).all()
    assert (found[2] == 0).all()


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(
        ["int4-b16", "int4-b32", "int2-b16", "int8-b16", "int4-b16-zp", "int3-b16", "fp8-e4m3"]
    ),
    n=st.integers(1, 20),
    k=st.integers(4, 70),
    seed=st.integers(0, 1000),
)
def test_white_inputs_make_gptq_round_to_nearest(name: str, n: int, k: int, seed: int) -> None:
    fmt = CoreFormat.parse(name)
    core = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    white = SecondMoment(np.eye(k))
    assert same(gptq.quantize(core, fmt, white), rtn.quantize(core, fmt))
    assert same(gptq.quantize(core, fmt, None), rtn.quantize(core, fmt))


@pytest.mark.parametrize("name", ["int4-b16", "int4-b32", "int3-b32", "int2-b16", "int4-b32-zp"])
def test_gptq_beats_rounding_where_inputs_are_correlated(name: str) -> None:
    fmt = CoreFormat.parse(name)
    for seed in range(6):
        core = np.random.default_rng(seed).standard_normal((24, 72)).astype(np.float32)
        moment = correlated(72, seed)
        errors = [moment.squared(method.quantize(core, fmt, moment).dequantize() - core) for method in (gptq, rtn)]
        assert errors[0] < 0.8 * errors[1], (seed, errors)


@pytest.mark.parametrize("name", ["int4-b16", "int3-b32", "int2-b64-zp", "fp8-e4m3"])
def test_gptq_is_the_slow_algorithm(name: str) -> None:
    """Every error pushed into every later column at once, in float64 (Algorithm 1 without its batching)."""
    fmt, moment = CoreFormat.parse(name), correlated(72, 3)
    core = np.random.default_rng(0).standard_normal((24, 72)).astype(np.float32)
    stored = gptq.quantize(core, fmt, moment)
    work, feedback = core.astype(np.float64), moment.feedback.astype(np.float64)
    for column in range(72):
        seen = stored.dequantize()[:, column]
        scale = np.abs(stored.scales[:, column // fmt.block].astype(np.float64))
        # On its grid, the value found is the nearest to what the earlier errors made of this one, or the grid's end.
        inside = (stored.codes[:, column] > 0) & (stored.codes[:, column] < (1 << fmt.bits) - 1)
        away = np.abs(seen - work[:, column])
        if fmt.fp8:
            assert (away <= 1e-5 + np.maximum(np.abs(seen) / 16, scale * 2**-10)).all()
        else:
            assert (away[inside] <= (0.5 + 1e-3) * scale[inside] + 1e-5).all()
        work[:, column:] -= np.outer((work[:, column] - seen) / feedback[column, column], feedback[column, column:])


def test_importance_moves_the_scale_search_towards_what_matters() -> None:
    core = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    weights = np.where(np.arange(32) < 8, 100.0, 0.01)
    moment = SecondMoment(np.diag(weights))
    fmt = CoreFormat.parse("int2-b32")
    plain, weighed = (rtn.quantize(core, fmt, m).dequantize() for m in (None, moment))
    assert moment.squared(weighed - core) < 0.9 * moment.squared(plain - core)


@pytest.mark.parametrize("samples", [3, 10])
def test_gptq_with_a_singular_moment(samples: int) -> None:
    """Fewer calibration tokens than channels, and channels that are always zero."""
    core = np.random.default_rng(0).standard_normal((8, 48)).astype(np.float32)
    h = correlated(48, 1, samples).matrix.copy()
    h[:, 10] = h[10, :] = 0
    fmt = CoreFormat.parse("int4-b16")
    for moment in (SecondMoment(h), SecondMoment(np.zeros((48, 48)))):
        stored = gptq.quantize(core, fmt, moment)
        assert np.isfinite(stored.dequantize()).all()
        assert moment.squared(stored.dequantize() - core) <= moment.squared(rtn.quantize(core, fmt).dequantize() - core)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    core = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    fmt = CoreFormat.parse("int4-b32")
    whole = rtn.quantize(core, fmt)
    monkeypatch.setattr(rtn, "_CHUNK_VALUES", 64 * 7)
    assert same(rtn.quantize(core, fmt), whole)


def damped_error(moment: SecondMoment, core: Array, stored: QuantizedTensor) -> float:
    """What the descent lowers, in float64."""
    error = core.astype(np.float64) - stored.dequantize()
    return float(np.einsum("ij,jk,ik->", error, moment.damped(DAMPING).astype(np.float64), error))


FORMATS = ["int8-b16", "int4-b16", "int4-b32", "int4-b16-zp", "int3-b16", "int2-b16", "int2-b64-zp"]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(FORMATS),
    n=st.integers(1, 20),
    k=st.integers(4, 70),
    samples=st.integers(2, 200),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]),
    seed=st.integers(0, 1000),
)
def test_descent_never_ends_above_gptq(name: str, n: int, k: int, samples: int, size: float, seed: int) -> None:
    fmt, moment = CoreFormat.parse(name), correlated(k, seed, samples)
    core = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    core *= np.float32(size)
    core[0] = 0
    before, after = (
        damped_error(moment, core / size, replace(stored, scales=stored.scales.astype(np.float64) / size))
        for stored in (method.quantize(core, fmt, moment) for method in (gptq, descent))
    )
    assert after <= before * (1 + 1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_descent_is_worth_its_time(name: str) -> None:
    fmt = CoreFormat.parse(name)
    gains = []
    for seed in range(4):
        core = np.random.default_rng(seed).standard_normal((24, 72)).astype(np.float32)
        moment = correlated(72, seed)
        errors = [moment.squared(m.quantize(core, fmt, moment).dequantize() - core) for m in (descent, gptq)]
        gains.append(errors[0] / errors[1])
    assert np.mean(gains) < 0.9


@pytest.mark.parametrize("name", ["int4-b16", "int2-b16-zp"])
def test_descent_ends_where_no_single_code_can_be_improved(name: str) -> None:
    """Brute force over every code of every place."""
    fmt, moment = CoreFormat.parse(name), correlated(20, 5)
    core = np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32)
    found = descent.quantize(core, fmt, moment, sweeps=60)
    least = damped_error(moment, core, found)
    assert least < damped_error(moment, core, gptq.quantize(core, fmt, moment))
    for row, column, code in product(range(3), range(20), range(1 << fmt.bits)):
        codes = found.codes.copy()
        codes[row, column] = code
        assert damped_error(moment, core, replace(found, codes=codes)) >= least * (1 - 1e-5)


def test_descent_finds_scales_that_least_squares_would() -> None:
    """With its codes held, a block's scale is the one that minimises the error, but for its eight bits."""
    fmt, moment = CoreFormat.parse("int2-b16"), correlated(32, 2)
    core = np.random.default_rng(1).standard_normal((5, 32)).astype(np.float32)
    found = descent.quantize(core, fmt, moment, sweeps=60)
    h = moment.damped(DAMPING).astype(np.float64)
    for row in range(5):
        levels = np.zeros((32, 2))
        for block in range(2):
            inside = slice(16 * block, 16 * block + 16)
            levels[inside, block] = found.codes[row, inside].astype(np.float64) - fmt.zero
        best = np.linalg.solve(levels.T @ h @ levels, levels.T @ h @ core[row].astype(np.float64))
        np.testing.assert_allclose(found.scales[row].astype(np.float64), best, rtol=2**-6)


def test_descent_without_statistics_rounds_to_nearest_and_leaves_fp8_to_gptq() -> None:
    core = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    assert same(descent.quantize(core, CoreFormat.parse("int4-b16")), rtn.quantize(core, CoreFormat.parse("int4-b16")))
    fp8, moment = CoreFormat.parse("fp8-e4m3"), correlated(40, 0)
    assert same(descent.quantize(core, fp8, moment), gptq.quantize(core, fp8, moment))


def test_descent_with_a_singular_moment_stays_finite() -> None:
    core = np.random.default_rng(0).standard_normal((8, 48)).astype(np.float32)
    fmt = CoreFormat.parse("int4-b16")
    for moment in (correlated(48, 1, 3), SecondMoment(np.zeros((48, 48)))):
        stored = descent.quantize(core, fmt, moment)
        assert np.isfinite(stored.dequantize()).all()
        assert damped_error(moment, core, stored) <= damped_error(moment, core, gptq.quantize(core, fmt, moment))


def test_the_descents_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    core, moment = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32), correlated(64, 0)
    fmt = CoreFormat.parse("int4-b32-zp")
    whole = descent.quantize(core, fmt, moment)
    monkeypatch.setattr(descent, "_CHUNK_VALUES", 64 * 7)
    chunked = descent.quantize(core, fmt, moment)
    assert damped_error(moment, core, chunked) == pytest.approx(damped_error(moment, core, whole), rel=0.02)
