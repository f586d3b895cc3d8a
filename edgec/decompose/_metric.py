"""Truncation and least squares in the metric of a second moment: the arithmetic that the decompositions share.

They all meet the same problem: what is left of a weight, M, acts on a state whose second moment is h; pick a subspace
for the next core, then fit what remains to what the core became. It lives beside the plugins, under a name that
is not one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve

from edgec.decompose import _randomised
from edgec.decompose._lapack import eigenpairs
from edgec.errors import NumericsError
from edgec.moments import SecondMoment

Array = NDArray[Any]

MAX_STATE = 4096
"""Widest intermediate whose full second moment is carried [count]; wider ones go on unweighted."""

_RIDGE = 1e-6
"""Share of the mean diagonal added to H, pulling the re-fit towards W itself where the activations say nothing."""

_ZERO = 1e-10
"""Share of the largest squared singular value below which one counts as zero: division by it would be noise."""


def ridged(h: Array) -> Array:
    """h [k, k] in float64, positive definite: a millionth of its mean diagonal added, 1 where it is zero."""
    result = np.array(h, dtype=np.float64)
    mean = float(np.trace(result)) / len(result)
    result[np.diag_indices_from(result)] += _RIDGE * mean if mean > 0 else 1.0
    return result


def marginal(h: Array | None, left: int, right: int) -> SecondMoment | None:
    """Second moment of the last `right` entries of a state [left, right], averaged over the left index."""
    if h is None:
        return None
    return SecondMoment(np.einsum("asat->st", h.reshape(left, right, left, right)) / left)


def marginal_roots(h: Array | None, modes: tuple[int, ...]) -> list[Array] | None:
    """Lower-triangular root of the marginal moment of each of one or two input modes; None without a moment."""
    if h is None:
        return None
    if len(modes) == 1:
        return [SecondMoment(h).root]
    left, right = modes
    four = h.reshape(left, right, left, right)
    return [
        SecondMoment(np.einsum("asbs->ab", four) / right).root,
        SecondMoment(np.einsum("asat->st", four) / left).root,
    ]


def right_singular(matrix: Array, rank: int) -> Array:
    """Leading right singular vectors [cols, rank], orthonormal, largest first, through the smaller Gram matrix.

    Randomised where the matrix is large and the rank small. Raises NumericsError where nothing converges.
    """
    rows, cols = matrix.shape
    if _randomised.worthwhile(matrix.shape, rank):
        return _randomised.right_singular(matrix, rank)
    if cols <= rows:
        return np.asarray(_eigh(matrix.T @ matrix, rank)[1])
    values, left = _eigh(matrix @ matrix.T, rank)
    vectors = matrix.T @ left
    if values[-1] > _ZERO * values[0]:
        return np.asarray(vectors / np.sqrt(values))
    # Vectors of numerically zero singular values must be orthogonal to the others too; signs are kept for
    # repeatability.
    vectors, upper = np.linalg.qr(vectors)
    return np.asarray(vectors * np.where(np.diag(upper) < 0, -1, 1).astype(vectors.dtype))


def _eigh(gram: Array, rank: int) -> tuple[Array, Array]:
    """Leading eigenpairs of a symmetric matrix, largest first."""
    values, vectors = eigenpairs(gram)
    return values[::-1][:rank], vectors[:, ::-1][:, :rank]


def refit(m: Array, h: Array | None, core: Array) -> tuple[Array, Array | None]:
    """Best remainder [O, I·χ] given core [o, χ, s] as the runtime sees it, and the second moment of the new state.

    Minimises Σ_o ‖m_o − R P_o‖²_h over R, where P_o = 1_I ⊗ core_o: R S = C with S = Σ P_o h P_oᵀ, C = Σ m_o h P_oᵀ.
    """
    outs, o, left, s = m.shape
    rank = core.shape[1]
    if h is None:
        gram = np.tensordot(core, core, axes=([0, 2], [0, 2]))  # tensordot, because einsum would not call BLAS
        right = np.tensordot(m, core, axes=([1, 3], [0, 2])).reshape(-1, rank)
        return solve(gram, right).reshape(outs, left * rank), None
    second = np.zeros((left * rank, left * rank))
    cross = np.zeros((outs, left * rank))
    for index in range(o):
        half = (h.reshape(-1, s) @ core[index].T).reshape(left * s, left * rank)  # h P_oᵀ
        cross += m[:, index].reshape(outs, -1) @ half
        second += (core[index] @ half.reshape(left, s, left * rank)).reshape(left * rank, left * rank)
    remainder = solve(second, cross)
    return remainder, second if len(second) <= MAX_STATE else None


def solve(gram: Array, right: Array) -> Array:
    """X with X gram = right for a symmetric positive semi-definite gram; directions without weight get none."""
    scale = np.sqrt(np.maximum(np.diag(gram), np.finfo(gram.dtype).tiny))
    normal = gram / np.outer(scale, scale)
    for ridge in (1e-12, 1e-9, 1e-6, 1e-3):
        damped = normal + ridge * np.eye(len(normal), dtype=normal.dtype)
        try:
            factor = np.linalg.cholesky(damped)
        except np.linalg.LinAlgError:
            continue
        return np.asarray(cho_solve((factor, True), (right / scale).T, check_finite=False).T / scale)
    raise NumericsError("the re-fit of a remainder to its quantised core is singular")
