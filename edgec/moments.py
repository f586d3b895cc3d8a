"""The input second moment H = E[x xᵀ] of a layer, with the factorizations that decompositions and quantizers share.

Everything edgec knows about the activations that a matrix really sees is in H: the squared output error of a
replacement W̃ is tr((W − W̃) H (W − W̃)ᵀ). The factorizations are cached because q, k and v share one input, and
because every candidate of a layer needs the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from edgec.errors import NumericsError

Array = NDArray[Any]

DAMPING = 0.01
"""Share of the mean diagonal added for GPTQ's feedback (the GPTQ paper's value)."""

_DRIFT_DAMPING = 0.02
"""Share of the mean diagonal added where a weight makes up for drift; the optimum is flat from 0.005 to 0.1."""

_SLAB_ROWS = 4096
"""Rows that are divided by H at a time, in float64."""

_ROOT_DAMPING = 1e-6
"""Share of the mean diagonal added for the square root: enough to make a rank-deficient H factorizable."""

UNSEEN = 0.5
"""Share of a table's reads that is taken to fall on any row alike: calibration text reads a few thousand tokens of a
vocabulary, and another text reads others (measured: a third of the tokens of STS-B are not in the default text)."""


class SecondMoment:
    """matrix: [k, k], symmetric positive semi-definite. Raises NumericsError when it is not finite."""

    def __init__(self, matrix: Array) -> None:
        if not np.isfinite(matrix).all():
            raise NumericsError("the second moment of the layer's input holds NaN or Inf")
        self.matrix: NDArray[np.float64] = np.asarray(matrix, dtype=np.float64)

    @property
    def width(self) -> int:
        return int(self.matrix.shape[0])

    @cached_property
    def diagonal(self) -> NDArray[np.float32]:
        """Mean square of every input channel, float32 [k]."""
        return np.maximum(np.diag(self.matrix), 0).astype(np.float32)

    @cached_property
    def root(self) -> NDArray[np.float64]:
        """Lower-triangular L [k, k] with L Lᵀ = H + a millionth of its mean diagonal."""
        return self._factor(self.matrix, _ROOT_DAMPING)

    @cached_property
    def feedback(self) -> NDArray[np.float32]:
        """Upper-triangular U [k, k] with UᵀU = (H + damping)⁻¹, float32: row j is GPTQ's feedback of column j.

        H read backwards is L Lᵀ, so H = R Rᵀ with R = L read backwards, upper triangular, and U = R⁻¹.
        """
        reverse = self._factor(self.matrix[::-1, ::-1], DAMPING)[::-1, ::-1]
        inverse, failed = lapack.dtrtri(np.asfortranarray(reverse), lower=0)
        if failed:
            raise NumericsError("the second moment of the layer's input is singular, even damped")
        return np.asarray(inverse, dtype=np.float32)

    def damped(self, share: float) -> NDArray[np.float32]:
        """H + `share` of its mean diagonal, over that mean: float32 [k, k] whose diagonal is `share` at the least. The
        identity where H is zero.
        """
        mean = float(np.trace(self.matrix)) / self.width
        result = np.empty(self.matrix.shape, np.float32)  # no second float64 copy of what may be half a GB
        seen = mean >= np.finfo(np.float64).tiny
        np.multiply(self.matrix, 1 / mean if seen else 0.0, out=result, casting="same_kind")
        result[np.diag_indices_from(result)] += np.float32(share if seen else 1.0)
        return result

    def squared(self, rows: Array) -> float:
        """tr(E H Eᵀ) for rows E [n, k]: the expected squared norm of E x."""
        e = np.asarray(rows, dtype=np.float32)
        return float(np.einsum("ij,ij->", e @ self.matrix.astype(np.float32), e))

    def divided(self, rows: Array, share: float) -> NDArray[np.float32]:
        """rows [n, k] times the inverse of H + `share` of its mean diagonal, float32 [n, k]."""
        lower = self._factor(self.matrix, share)
        result = np.empty(rows.shape, np.float32)
        for start in range(0, len(rows), _SLAB_ROWS):
            slab = np.asarray(rows[start : start + _SLAB_ROWS].T, dtype=np.float64, order="F")
            solved, _ = lapack.dpotrs(lower, slab, lower=1, overwrite_b=1)
            result[start : start + _SLAB_ROWS] = solved.T
        return result

    @staticmethod
    def _factor(matrix: NDArray[np.float64], share: float) -> NDArray[np.float64]:
        mean = float(np.trace(matrix)) / len(matrix)
        damping = share * mean if mean > 0 else 1.0
        for _ in range(12):
            damped = np.array(matrix, order="F")
            damped[np.diag_indices_from(damped)] += damping
            lower, failed = lapack.dpotrf(damped, lower=1, overwrite_a=1, clean=1)
            if not failed:
                return np.asarray(lower, dtype=np.float64)
            damping *= 10
        raise NumericsError("the second moment of the layer's input is not positive semi-definite")


@dataclass(frozen=True, eq=False)
class Drift:
    """How far compression has moved what a layer works on: x for the dense model, x̃ here.

    inputs: E[(x − x̃) x̃ᵀ], float32 [k, k]. sums: E[(r − r̃) x̃ᵀ], float32 [n, k], where the layer's output is added to a
    tensor r (the residual stream); None where it is not.
    """

    inputs: NDArray[np.float32]
    sums: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class Seen:
    """What a layer was seen to work on. moment: of its input. drift: from the dense model's; None where that was not
    looked at.
    """

    moment: SecondMoment
    drift: Drift | None = None

    def target(self, weight: Array) -> Array:
        """What to fit in place of `weight` W [n, k]: W itself without drift, else, float32, the matrix that on x̃ comes
        closest to what W gives on x. Least squares of r + W x − r̃ − W̃ x̃, damped towards W:

            W̃ = W + (W E[(x − x̃) x̃ᵀ] + E[(r − r̃) x̃ᵀ]) (E[x̃ x̃ᵀ] + λ)⁻¹

        What is fitted to W̃ under the moment of x̃ is fitted to the dense model's outputs, whatever its form. Fitting to
        outputs is the asymmetric calibration of GPTAQ (Li et al. 2025, arXiv 2504.02692); r is edgec's addition.
        """
        if self.drift is None:
            return weight
        dense = np.asarray(weight, np.float32)
        missing = dense @ self.drift.inputs
        if self.drift.sums is not None:
            missing += self.drift.sums
        target = self.moment.divided(missing, _DRIFT_DAMPING)
        target += dense
        return target


class TableMoment(SecondMoment):
    """A lookup table's statistics, the other way round: a table [v, d] has no input, so `matrix` [d, d] is the
    curvature G at its output, and `rows` [v] is how often each row is read. An error E costs ½ Σ_v rows_v E_v G E_vᵀ.
    """

    def __init__(self, curvature: Array, rows: Array) -> None:
        super().__init__(curvature)
        if not (np.isfinite(rows).all() and (rows >= 0).all()):
            raise NumericsError("how often a table's rows are read is negative, NaN or Inf")
        self.rows: NDArray[np.float32] = np.asarray(rows, dtype=np.float32)

    @classmethod
    def of_reads(cls, shares: Array, width: int) -> TableMoment:
        """Where no gradient was measured: rows count by their share of all reads [v], columns all alike.

        That is most of it: all-MiniLM-L6-v2's table in 2 and 4 bits, the rest of a plan of 5 bits as it is, brings
        1 - cosine to 0.0074 on held-out text if rows count alike, to 0.0039 so, and to 0.0038 by gradients.
        """
        return cls(np.eye(width, dtype=np.float32), smoothed(shares))


def smoothed(frequencies: Array) -> Array:
    """What a table's rows count [v], with `UNSEEN` of the whole shared out evenly; the sum stays."""
    total = frequencies.sum(dtype=np.float64)
    even = total / len(frequencies) if total > 0 else 1 / len(frequencies)
    return np.asarray((1 - UNSEEN) * frequencies + UNSEEN * even, dtype=np.float32)
