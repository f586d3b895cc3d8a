"""LAPACK's symmetric eigensolvers, each with a second driver for the matrices on which the first does not converge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from edgec.errors import NumericsError

T = TypeVar("T")
Array = NDArray[Any]


def eigenpairs(gram: Array, *, lean: bool = False) -> tuple[Array, Array]:
    """Eigenvalues [n], smallest first, and eigenvectors [n, n] of a symmetric matrix, in its dtype.

    Divide and conquer (`evd`) first, which is the fastest and takes 2 n² numbers of workspace; lean: relatively robust
    representations (`evr`) first, which take none to speak of. Raises NumericsError where neither converges.
    """
    found: tuple[Array, Array] = _tried(
        ("evr", "evd") if lean else ("evd", "evr"), lambda driver: linalg.eigh(gram, driver=driver, check_finite=False)
    )
    return found


def eigenvalues(gram: Array) -> Array:
    """Eigenvalues [n] of a symmetric matrix, smallest first. Raises NumericsError where nothing converges."""
    return _tried(("evr", "evd"), lambda driver: linalg.eigvalsh(gram, driver=driver, check_finite=False))


def _tried(drivers: tuple[str, ...], solve: Callable[[str], T]) -> T:
    for driver in drivers:
        try:
            return solve(driver)
        except np.linalg.LinAlgError:
            continue
    raise NumericsError(f"the eigenvalues of a matrix do not converge by any driver ({', '.join(drivers)})")
