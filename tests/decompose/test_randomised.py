"""The randomised decomposition against the exact one, and that it changes nothing but the time."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgec.decompose import _metric, _randomised
from edgec.fit import fit
from edgec.moments import SecondMoment
from edgec.quantize.formats import CoreFormat
from edgec.records import Spec


def matrix(spectrum: NDArray[np.float64], rows: int, cols: int, dtype: type = np.float32) -> NDArray[np.float32]:
    generator = np.random.default_rng(5)
    left = np.linalg.qr(generator.standard_normal((rows, len(spectrum))))[0]
    right = np.linalg.qr(generator.standard_normal((cols, len(spectrum))))[0]
    return ((left * spectrum) @ right.T).astype(dtype)


@pytest.mark.parametrize(("rows", "cols"), [(240, 300), (300, 240)])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("rank", [5, 30, 60])
def test_error_is_within_a_hundredth_of_the_optimum(rows: int, cols: int, power: float, rank: int) -> None:
    spectrum = np.arange(1, 241) ** -power
    a = matrix(spectrum, rows, cols).astype(np.float64)
    v = _randomised.right_singular(a, rank)
    optimum = np.sqrt((spectrum[rank:] ** 2).sum())
    assert v.shape == (cols, rank)
    np.testing.assert_allclose(v.T @ v, np.eye(rank), atol=1e-10)
    assert optimum * (1 - 1e-6) <= np.linalg.norm(a - (a @ v) @ v.T) <= 1.01 * optimum
    strengths = np.linalg.norm(a @ v, axis=0)
    assert (np.diff(strengths) <= 1e-9 * strengths[0]).all(), "largest first"


def test_a_matrix_of_lower_rank_than_asked_for_is_still_given_orthonormal_vectors() -> None:
    a = matrix(np.array([3.0, 2.0, 1.0]), 90, 70).astype(np.float64)
    for thing in (a, np.zeros_like(a)):
        v = _randomised.right_singular(thing, 12)
        np.testing.assert_allclose(v.T @ v, np.eye(12), atol=1e-10)
        np.testing.assert_allclose((thing @ v) @ v.T, thing, atol=1e-6)


def test_power_iterations_pay() -> None:
    a = matrix(np.arange(1, 241) ** -0.5, 240, 300).astype(np.float64)
    errors = []
    for power in (0, 1, 2):
        v = _randomised.right_singular(a, 30, power=power)
        errors.append(np.linalg.norm(a - (a @ v) @ v.T))
    assert errors[0] > errors[1] > errors[2]


def test_only_large_matrices_at_small_ranks() -> None:
    assert not _randomised.worthwhile((2048, 9000), 10)
    assert _randomised.worthwhile((4096, 9000), 512)
    assert not _randomised.worthwhile((4096, 9000), 513)


@pytest.mark.parametrize("whitened", [False, True])
def test_fits_use_it_and_an_earlier_fit_does_not_show(monkeypatch: pytest.MonkeyPatch, whitened: bool) -> None:
    generator = np.random.default_rng(0)
    weight = matrix(np.arange(1, 97) ** -0.7, 96, 128)
    x = generator.standard_normal((512, 128)) * np.linspace(2, 0.2, 128)
    moment = SecondMoment(x.T @ x / 512) if whitened else None
    fp32 = CoreFormat(32)

    def error(found: NDArray[np.float32]) -> float:
        return moment.squared(weight - found) if moment else float(((weight - found) ** 2).sum())

    exact = {rank: error(fit(weight, Spec("svd", (rank,)), fp32, moment=moment).dense()) for rank in (4, 12)}
    monkeypatch.setattr(_randomised, "LARGE", 64)
    calls: list[int] = []
    whole = _randomised.right_singular
    monkeypatch.setattr(_metric._randomised, "right_singular", lambda m, r: calls.append(r) or whole(m, r))
    weight = weight.copy()  # a new weight: nothing remembered
    fit(weight, Spec("svd", (90,)), fp32, moment=moment)
    assert calls == []
    warm = {rank: fit(weight, Spec("svd", (rank,)), fp32, moment=moment).dense() for rank in (12, 4)}
    assert calls == [12, 4]
    for rank, found in warm.items():
        assert error(found) <= 1.02 * exact[rank]
        np.testing.assert_array_equal(found, fit(weight.copy(), Spec("svd", (rank,)), fp32, moment=moment).dense())
