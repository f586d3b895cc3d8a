"""The search over mode factorizations: what it promises is held against fitted trains."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec.contraction import parameters
from edgec.decompose import _mode_search
from edgec.decompose._mode_search import search
from edgec.decompose.tensor_train import beside
from edgec.fit import contraction_of, fit
from edgec.moments import SecondMoment
from edgec.quantize.formats import CoreFormat

FP32 = CoreFormat(32)


def test_a_kronecker_product_is_found_in_its_own_modes() -> None:
    generator = np.random.default_rng(0)
    weight = sum(np.kron(generator.standard_normal((6, 4)), generator.standard_normal((4, 9))) for _ in range(2))
    weight = weight + 1e-3 * generator.standard_normal((24, 36))
    (spec, error), *_ = search(weight, None, 0.3, 1)
    assert spec.modes == ((6, 4), (4, 9))
    assert error < 0.01
    found = fit(weight.astype(np.float32), spec, FP32).dense()
    assert np.linalg.norm(weight - found) <= 0.01 * np.linalg.norm(weight)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(24, 36), (36, 24), (16, 64), (30, 42)]),
    ratio=st.sampled_from([0.3, 0.5, 0.8]),
    multiple=st.sampled_from([1, 4]),
    weighed=st.booleans(),
    seed=st.integers(0, 50),
)
def test_trains_fit_and_err_no_more_than_predicted(
    shape: tuple[int, int], ratio: float, multiple: int, weighed: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    weight = (generator.standard_normal(shape) * np.exp(-np.arange(shape[1]) * 3 / shape[1])).astype(np.float32)
    scale = np.exp(generator.standard_normal(shape[1])) if weighed else np.ones(shape[1])
    found = search(weight, SecondMoment(np.diag(scale**2)) if weighed else None, ratio, multiple, best=4)
    assert [error for _, error in found] == sorted(error for _, error in found)
    assert len({spec.modes for spec, _ in found}) == len(found)
    for spec, error in found:
        assert parameters(contraction_of(spec, shape, "linear")) <= ratio * weight.size
        assert all(rank % multiple == 0 for rank in spec.ranks)
        assert all(rank < top for rank, top in zip(spec.ranks, beside(spec.ranks, spec.modes), strict=True))
        scaled = (weight * scale).astype(np.float32)  # a diagonal moment is a scaling of the columns
        lost = np.linalg.norm(scaled - fit(scaled, spec, FP32).dense())
        assert lost <= error * np.linalg.norm(scaled) * (1 + 1e-3) + 1e-6


def test_same_input_same_trains_and_nothing_to_search_is_no_error() -> None:
    weight = np.random.default_rng(3).standard_normal((48, 64)).astype(np.float32)
    assert search(weight, None, 0.5, 4) == search(weight.copy(), None, 0.5, 4) != []
    assert search(np.zeros((48, 64), np.float32), None, 0.5, 4) == []
    assert search(np.full((48, 64), np.nan, np.float32), None, 0.5, 4) == []
    assert search(np.ones((7, 11), np.float32), None, 0.5, 1) == []


def test_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(3).standard_normal((48, 64)).astype(np.float32)
    made: list[_mode_search._Spectra] = []
    whole = _mode_search._Spectra
    monkeypatch.setattr(_mode_search, "_Spectra", lambda w: made.append(whole(w)) or made[-1])
    monkeypatch.setattr(_mode_search, "WORK", 0.0)
    few = search(weight, None, 0.5, 4, best=999)
    monkeypatch.setattr(_mode_search, "WORK", 1e12)
    assert len(search(weight, None, 0.5, 4, best=999)) > len(few) > 0
    assert made[0].spent <= made[0].allowed < made[1].spent
