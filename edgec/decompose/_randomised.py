"""Leading singular vectors of a large matrix by random projection (Halko, Martinsson & Tropp 2011, arXiv 0909.4061).

An exact truncated SVD through the Gram matrix costs about 9 n³; a small share of the vectors of a matrix of smaller
side n costs a handful of products with it this way. Power iterations are what make the result as good as the exact
one on the slowly decaying spectra that weights have (their §4.5). A Krylov method (ARPACK, block Lanczos) was turned
down: it converges faster per product, but in many small steps that do not fill the cores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.decompose._lapack import eigenpairs

Array = NDArray[Any]

LARGE = 2048
"""Smaller side above which a truncated decomposition may be randomised [count]."""

SHARE = 0.125
"""Share of the smaller side up to which the rank must lie. On one core, 2100 x 2304: half the time of the exact way at
an eighth, break-even at about a sixth, slower at a quarter.
"""

POWER_ITERATIONS = 2
"""Products with A Aᵀ beyond the first. With the oversampling below, the error was within 1.006 of the optimum on
σ_k ~ k^-½ and within 1.01 on the flat spectrum of a Gaussian matrix, at ranks up to a quarter.
"""

OVERSAMPLING = 0.5
"""Columns drawn beyond the rank, as a share of it. The 5 to 10 columns of their §4.2 are for spectra that fall fast:
with 32 columns the error at large ranks was 1.4 % above the optimum.
"""

_SEED = 0


def worthwhile(shape: tuple[int, ...], rank: int) -> bool:
    """Is the matrix so large, and the rank so small beside it, that the randomised way is the better one?"""
    return min(shape) > LARGE and rank <= SHARE * min(shape)


def right_singular(matrix: Array, rank: int, *, power: int = POWER_ITERATIONS) -> Array:
    """Approximate leading right singular vectors [cols, rank], orthonormal, largest first; float32 for float32 and
    float64 else.

    Algorithm 4.4 (randomised subspace iteration, orthonormalised after every product) finds a basis Q of the row
    space, Algorithm 5.1 the singular vectors inside it. Seeded: the same matrix gives the same bytes.
    """
    rows, cols = matrix.shape
    width = min(rank + max(16, int(OVERSAMPLING * rank)), rows, cols)
    start = np.random.default_rng(_SEED).standard_normal((rows, width), dtype=np.float32)
    basis = _orthonormal(matrix.T @ start.astype(matrix.dtype, copy=False))
    for _ in range(power):
        basis = _orthonormal(matrix.T @ _orthonormal(matrix @ basis))
    inside = matrix @ basis
    # The Gram matrix of what is inside is small: eigenvectors of BᵀB are right singular vectors of B.
    _, vectors = eigenpairs(inside.T @ inside, lean=True)
    return np.asarray(basis @ vectors[:, ::-1][:, :rank])


def _orthonormal(columns: Array) -> Array:
    return np.asarray(np.linalg.qr(columns)[0])
