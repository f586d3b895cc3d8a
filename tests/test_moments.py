"""The second moment's factorizations, on well-behaved, singular, zero and hopeless matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec import moments
from edgec.errors import NumericsError
from edgec.moments import DAMPING, Drift, SecondMoment, Seen


def moment(width: int, samples: int, seed: int = 0) -> np.ndarray[Any, Any]:
    x = np.random.default_rng(seed).standard_normal((samples, width)) * np.exp(-np.arange(width) * 3 / width)
    return x.T @ x / samples


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 40), samples=st.integers(1, 80), seed=st.integers(0, 99))
def test_root_and_feedback_are_the_factorizations_they_claim(width: int, samples: int, seed: int) -> None:
    matrix = moment(width, samples, seed)
    found, mean = SecondMoment(matrix), np.trace(matrix) / width
    root, feedback = found.root, found.feedback.astype(np.float64)
    np.testing.assert_array_equal(np.triu(root, 1), 0)
    np.testing.assert_allclose(root @ root.T, matrix, atol=2e-6 * mean)
    np.testing.assert_array_equal(np.tril(feedback, -1), 0)
    damped = matrix + DAMPING * mean * np.eye(width)
    np.testing.assert_allclose(feedback.T @ feedback @ damped, np.eye(width), atol=2e-3)


def test_a_zero_moment_is_treated_as_white() -> None:
    zero = SecondMoment(np.zeros((5, 5)))
    np.testing.assert_allclose(zero.root, np.eye(5))
    np.testing.assert_allclose(zero.feedback, np.eye(5))
    assert (zero.diagonal == 0).all()
    assert zero.squared(np.ones((2, 5))) == 0


@pytest.mark.parametrize("size", [1.0, 1e80, 1e-80])
def test_damped_is_in_units_of_the_mean_whatever_its_size(size: float) -> None:
    """Squares of activations may be beyond float32."""
    matrix = moment(12, 5)
    found = SecondMoment(size * matrix).damped(0.02)
    assert found.dtype == np.float32
    mean = np.trace(matrix) / 12
    np.testing.assert_allclose(found, matrix / mean + 0.02 * np.eye(12), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-320])
def test_damped_is_the_identity_where_nothing_was_seen(size: float) -> None:
    np.testing.assert_array_equal(SecondMoment(size * np.eye(4)).damped(0.01), np.eye(4, dtype=np.float32))


def test_squared_is_the_expected_output_error() -> None:
    generator = np.random.default_rng(0)
    x, error = generator.standard_normal((200, 6)), generator.standard_normal((3, 6))
    expected = float(((x @ error.T) ** 2).sum() / 200)
    assert SecondMoment(x.T @ x / 200).squared(error) == pytest.approx(expected, rel=1e-5)


def test_float32_noise_below_zero_is_damped_away() -> None:
    """A rank-one moment accumulated in float32 has eigenvalues that are a little negative."""
    x = np.random.default_rng(0).standard_normal((1, 200)).astype(np.float32) * 30
    found = SecondMoment(x.T @ x)
    assert np.isfinite(found.root).all()
    assert np.isfinite(found.feedback).all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9), width=st.integers(1, 20), samples=st.integers(1, 60), seed=st.integers(0, 99),
    added=st.booleans(),
)  # fmt: skip
def test_the_target_makes_up_for_drift(rows: int, width: int, samples: int, seed: int, added: bool) -> None:
    """Ridge regression of what the dense model adds up, in float64, from the samples themselves."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, width)).astype(np.float32)
    x = rng.standard_normal((samples, width))
    drifted = x + 0.3 * rng.standard_normal((samples, width)) * np.linspace(0.1, 2, width)
    residual = rng.standard_normal((samples, rows)) if added else np.zeros((samples, rows))
    drift = Drift(
        ((x - drifted).T @ drifted / samples).astype(np.float32),
        (residual.T @ drifted / samples).astype(np.float32) if added else None,
    )
    moment = SecondMoment(drifted.T @ drifted / samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "_SLAB_ROWS", 4)
        found = Seen(moment, drift).target(weight)
    damping = moments._DRIFT_DAMPING * np.trace(moment.matrix) / width
    # Σ‖r − r̃ + W x − (W + C) x̃‖² / samples + damping ‖C‖² is least for this C:
    missing = residual + (x - drifted) @ weight.T.astype(np.float64)
    stacked = np.concatenate([drifted / np.sqrt(samples), np.sqrt(damping) * np.eye(width)])
    wanted = np.concatenate([missing / np.sqrt(samples), np.zeros((width, rows))])
    change = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, weight + change, rtol=1e-3, atol=2e-4)


def test_without_drift_the_target_is_the_weight() -> None:
    weight = np.ones((2, 3), np.float16)
    white = SecondMoment(np.eye(3))
    assert Seen(white).target(weight) is weight
    still = Seen(white, Drift(np.zeros((3, 3), np.float32), np.zeros((2, 3), np.float32))).target(weight)
    np.testing.assert_array_equal(still, weight)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_moments_that_are_not_finite_are_refused(bad: float) -> None:
    matrix = np.eye(3)
    matrix[1, 1] = bad
    with pytest.raises(NumericsError, match="NaN or Inf"):
        SecondMoment(matrix)


def test_a_moment_that_is_none_is_refused() -> None:
    with pytest.raises(NumericsError, match="not positive semi-definite"):
        _ = SecondMoment(-1e20 * np.eye(4) + np.diag([3e20, 0, 0, 0])).root
