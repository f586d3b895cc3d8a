"""A head that is too tall to be held several times over is factored slab by slab, to the same factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgec.errors import NumericsError, PlanError
from edgec.fit import fit
from edgec.moments import SecondMoment
from edgec.quantize.formats import CoreFormat
from edgec.records import Spec

SVD = Spec("svd", (8,))


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgec.decompose.svd._TALL_VALUES", 1000)
    monkeypatch.setattr("edgec.decompose.svd._ROWS", 37)


def tall(seed: int = 0) -> tuple[Any, SecondMoment]:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((200, 24)) @ np.diag(1 / np.arange(1, 25)) @ rng.standard_normal((24, 24))).astype(
        np.float16
    )
    x = rng.standard_normal((300, 24)) @ rng.standard_normal((24, 24))
    return weight, SecondMoment(x.T @ x / 300)


@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize("name", ["fp32", "int8-b32", "int4-b32"])
def test_slabs_give_what_the_whole_gives(name: str, whitened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = tall()
    seen = moment if whitened else None
    whole = fit(weight.astype(np.float32), SVD, CoreFormat.parse(name), moment=seen)
    monkeypatch.setattr("edgec.decompose.svd._TALL_VALUES", 1000)
    monkeypatch.setattr("edgec.decompose.svd._ROWS", 37)
    slabs = fit(weight, SVD, CoreFormat.parse(name), moment=seen)
    assert {n: c.shape for n, c in slabs.cores.items()} == {n: c.shape for n, c in whole.cores.items()}
    differences = [f.dense() - weight for f in (whole, slabs)]
    errors = [moment.squared(e) if whitened else float(np.sum(e**2)) for e in differences]
    if name == "fp32":
        np.testing.assert_allclose(slabs.dense(), whole.dense(), rtol=1e-3, atol=1e-4 * np.abs(weight).max())
    assert errors[1] == pytest.approx(errors[0], rel=0.03)  # signs of singular vectors are free: other roundings


@pytest.mark.usefixtures("small_slabs")
def test_rank_deficient_and_zero_weights() -> None:
    weight, moment = tall()
    flat = weight.astype(np.float32) @ np.diag([1.0] * 5 + [0.0] * 19)
    for part in (flat, 0 * flat):
        fitted = fit(part, SVD, CoreFormat(32), moment=moment)
        np.testing.assert_allclose(fitted.dense(), part, atol=1e-3 * max(np.abs(flat).max(), 1e-9))


@pytest.mark.usefixtures("small_slabs")
def test_what_does_not_fit_is_refused() -> None:
    weight, moment = tall()
    with pytest.raises(PlanError, match="rank 25"):
        fit(weight, Spec("svd", (25,)), CoreFormat(32), moment=moment)
    with pytest.raises(NumericsError, match="overflows"):
        fit(np.full((200, 24), 1e30, np.float32), SVD, CoreFormat(32), moment=moment)
