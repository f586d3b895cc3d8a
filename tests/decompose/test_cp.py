"""CP: exact where it is provably so, monotone, and never larger on disk or in FLOPs than it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgec.contraction import flops, parameters
from edgec.decompose import cp
from edgec.errors import PlanError
from edgec.fit import contraction_of, fit
from edgec.moments import SecondMoment
from edgec.quantize.formats import CoreFormat, QuantizedTensor
from edgec.records import Spec

FP32 = CoreFormat(32)


def whole(factors: list[NDArray[np.float64]], shape: tuple[int, ...]) -> NDArray[np.float64]:
    return cp.khatri_rao(*factors).sum(axis=1).reshape(shape)


def known(shape: tuple[int, ...], rank: int, seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    return whole([generator.standard_normal((n, rank)) for n in shape], shape)


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=3, max_size=4).map(tuple), seed=st.integers(0, 99))
def test_any_tensor_is_exact_at_the_maximum_rank(shape: tuple[int, ...], seed: int) -> None:
    tensor = np.random.default_rng(seed).standard_normal(shape)
    found = whole(cp.als(tensor, cp.max_rank(shape)), shape)
    assert np.linalg.norm(found - tensor) <= 1e-6 * np.linalg.norm(tensor)


@pytest.mark.parametrize("shape", [(12, 4, 6), (3, 4, 4, 6)])
@pytest.mark.parametrize("rank", [1, 3, 9, 20])
def test_the_error_never_rises(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], rank: int) -> None:
    tensor = np.random.default_rng(rank).standard_normal(shape)
    monkeypatch.setattr(cp, "_ENOUGH", 0.0)
    errors = []
    for sweeps in (0, 1, 2, 5, 12, 24):
        monkeypatch.setattr(cp, "_SWEEPS", sweeps)
        errors.append(float(np.linalg.norm(whole(cp.als(tensor, rank), shape) - tensor)))
    assert all(after <= before * (1 + 1e-9) for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < errors[0]


def test_a_rank_one_tensor_is_found_and_noise_is_not_fitted_with_it() -> None:
    for shape in ((8, 4, 6), (3, 4, 4, 6)):
        tensor = known(shape, 1, 7)
        found = whole(cp.als(tensor, 1), shape)
        assert np.linalg.norm(found - tensor) <= 1e-6 * np.linalg.norm(tensor)


def test_orthogonal_terms_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dependent terms can hold ALS up in a local minimum (Kolda & Bader 2009, §3.4); orthogonal ones do not."""
    monkeypatch.setattr(cp, "_ENOUGH", 1e-9)
    generator = np.random.default_rng(1)
    factors = [np.linalg.qr(generator.standard_normal((n, 3)))[0] for n in (10, 6, 8)]
    tensor = whole([factors[0] * [3.0, 2.0, 1.0], *factors[1:]], (10, 6, 8))
    found = whole(cp.als(tensor, 3), (10, 6, 8))
    assert np.linalg.norm(found - tensor) <= 1e-3 * np.linalg.norm(tensor)


def test_the_moment_lowers_the_functional_error() -> None:
    generator = np.random.default_rng(4)
    weight = generator.standard_normal((20, 24)).astype(np.float32)
    x = generator.standard_normal((400, 24)) * np.exp(-np.arange(24) / 5)
    moment = SecondMoment(x.T @ x / 400)
    spec = Spec("cp", (10,), ((20, 1), (1, 4), (1, 6)))
    plain, whitened = (fit(weight, spec, FP32, moment=m).dense() for m in (None, moment))
    assert moment.squared(weight - whitened) < 0.7 * moment.squared(weight - plain)


@pytest.mark.parametrize("fmt", ["int8-b16", "int4-b32", "int2-b64", "int4-b16-zp", "fp16"])
def test_repeating_by_ones_repeats_in_every_format(fmt: str) -> None:
    weight = np.random.default_rng(0).standard_normal((24, 36)).astype(np.float32)
    factors = fit(weight, Spec("cp", (16,), ((4, 1), (6, 1), (1, 6), (1, 6))), CoreFormat.parse(fmt))
    ones = factors.values()["spread"]
    assert (ones == ones[0]).all()
    assert ones[0, 0] == pytest.approx(1.0, rel=0.01 if fmt.endswith("zp") else 0)
    scale = factors.cores["inner_scale"]
    assert not isinstance(scale, QuantizedTensor)
    assert scale.dtype == np.float16


def test_costs_are_those_of_a_low_rank_form_with_more_terms() -> None:
    contraction = contraction_of(Spec("cp", (40,), ((64, 1), (1, 8), (1, 16))), (64, 128), "linear")
    assert parameters(contraction) == 40 * (64 + 8 + 16)
    assert flops(contraction) == 2 * 40 * (64 + 128) + 2 * 8 * 40
    contraction = contraction_of(Spec("cp", (40,), ((8, 1), (8, 1), (1, 128))), (64, 128), "linear")
    assert parameters(contraction) == 40 * (8 + 8 + 128) + 8


def test_a_matrix_in_two_modes_is_refused() -> None:
    for modes in ((), ((24, 1), (1, 36))):
        with pytest.raises(PlanError, match="it is an svd"):
            contraction_of(Spec("cp", (4,), modes), (24, 36), "linear")
