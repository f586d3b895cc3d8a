"""A driver that does not converge is followed by another one, whose answer is as good."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg

from edgec.decompose._lapack import eigenpairs, eigenvalues
from edgec.decompose.svd import factorize
from edgec.errors import NumericsError
from edgec.fit import fit
from edgec.quantize.formats import LayerFormat
from edgec.records import Spec

EIGH, EIGVALSH = scipy.linalg.eigh, scipy.linalg.eigvalsh


def failing(real: Any, *drivers: str) -> Any:
    def solve(matrix: Any, *, driver: str, **options: Any) -> Any:
        if driver in drivers:
            raise np.linalg.LinAlgError("did not converge")
        return real(matrix, driver=driver, **options)

    return solve


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("lost", ["evd", "evr"])
def test_the_other_driver_takes_over(monkeypatch: pytest.MonkeyPatch, lost: str, lean: bool) -> None:
    half = np.random.default_rng(0).standard_normal((24, 24))
    gram = half @ half.T
    monkeypatch.setattr(scipy.linalg, "eigh", failing(EIGH, lost))
    monkeypatch.setattr(scipy.linalg, "eigvalsh", failing(EIGVALSH, lost))
    values, vectors = eigenpairs(gram, lean=lean)
    np.testing.assert_allclose(vectors * values @ vectors.T, gram, atol=1e-10)
    np.testing.assert_allclose(eigenvalues(gram), values, atol=1e-10)


def test_without_any_driver_the_error_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scipy.linalg, "eigh", failing(EIGH, "evd", "evr"))
    weight = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    with pytest.raises(NumericsError, match="do not converge by any driver"):
        factorize(weight, Spec("svd", (8,)), None, lambda name, core, moment: core)


def test_an_svd_that_does_not_converge_names_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverges(*_: Any, **__: Any) -> Any:
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(np.linalg, "svd", diverges)
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    with pytest.raises(NumericsError, match="cp: SVD did not converge; give the layer another form"):
        fit(weight, Spec("cp", (8,), ((8, 1), (8, 1), (1, 8), (1, 8))), LayerFormat.parse("fp32"))
