"""Rotations: orthogonal, exactly undone, kept only where they lose less, and without power over a truncation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgec.decompose import disentangled
from edgec.fit import fit
from edgec.moments import SecondMoment
from edgec.quantize.formats import CoreFormat, LayerFormat, QuantizedTensor
from edgec.records import Spec

OUT, IN, B = 48, 128, 32
MODES = ((OUT, 1), (1, IN // B), (1, B))


def moment_of(width: int = IN, seed: int = 1) -> SecondMoment:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((4 * width, width)) @ (generator.standard_normal((width, width)) / 8 + np.eye(width))
    return SecondMoment(x.T @ x / len(x))


def outliers(seed: int = 0) -> NDArray[np.float32]:
    """A few large entries, each in a block of small ones: what one scale per block cannot hold."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((OUT, IN))
    weight[generator.random((OUT, IN)) < 0.02] *= 12
    return weight.astype(np.float32)


@pytest.mark.parametrize("b", [1, 2, 3, 6, 8, 12, 32])
def test_rotations_are_orthogonal(b: int) -> None:
    for rotation in (disentangled.spread(b), disentangled.learned(moment_of(4 * b), b)):
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(b), atol=1e-12)
    assert np.allclose(np.abs(disentangled.spread(32)), 32**-0.5)


def test_the_learned_rotation_leaves_the_mean_block_uncorrelated() -> None:
    moment = moment_of()
    rotation = disentangled.learned(moment, B)
    mean = np.einsum("gsgt->st", moment.matrix.reshape(IN // B, B, IN // B, B))
    turned = rotation @ mean @ rotation.T
    np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-9 * np.abs(turned).max())
    assert (np.diff(np.diag(turned)) <= 1e-9).all(), "largest first"


@pytest.mark.parametrize("fmt", ["int4-b32", "int2-b64+int8-b32", "int8-b16"])
def test_a_quantised_rotation_is_undone(fmt: str) -> None:
    """W' is fitted to the rotation that was stored: what is lost is what rounding W' alone loses."""
    weight, moment = outliers(), moment_of()
    factors = fit(weight, Spec("disentangled", (), MODES), LayerFormat.parse(fmt), moment=moment)
    stored = factors.cores["rotation"]
    assert isinstance(stored, QuantizedTensor)
    assert str(stored.fmt) == fmt.rpartition("+")[2]
    rotation = np.kron(np.eye(IN // B), factors.values()["rotation"].astype(np.float64))
    rounded = factors.values()["backbone"] - weight @ np.linalg.inv(rotation)
    turned = SecondMoment(rotation @ moment.matrix @ rotation.T)
    assert moment.squared(weight - factors.dense()) == pytest.approx(turned.squared(rounded), rel=1e-3)


@pytest.mark.parametrize(("fmt", "plain"), [("int4-b32", "int4-b32"), ("int2-b64+int8-b32", "int2-b64")])
def test_outliers_are_worth_a_rotation(fmt: str, plain: str) -> None:
    for seed in range(3):
        weight, moment = outliers(seed), moment_of(seed=seed)
        rotated = fit(weight, Spec("disentangled", (), MODES), LayerFormat.parse(fmt), moment=moment)
        dense = fit(weight, Spec("dense"), LayerFormat.parse(plain), moment=moment)
        assert moment.squared(weight - rotated.dense()) < 0.8 * moment.squared(weight - dense.dense())


def test_the_better_rotation_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, fmt, moment = Spec("disentangled", (), MODES), LayerFormat.parse("int4-b32"), moment_of()
    rotations = {"spread": disentangled.spread(B), "learned": disentangled.learned(moment, B)}
    for weight in (outliers(), np.random.default_rng(0).standard_normal((OUT, IN)).astype(np.float32)):
        errors = {}
        for name, rotation in rotations.items():
            with monkeypatch.context() as patched:
                patched.setattr(disentangled, "spread", lambda b, rotation=rotation: rotation)
                patched.setattr(disentangled, "learned", lambda m, b, rotation=rotation: rotation)
                errors[name] = moment.squared(weight - fit(weight, spec, fmt, moment=moment).dense())
        assert errors["spread"] != errors["learned"]
        found = fit(weight, spec, fmt, moment=moment)
        assert moment.squared(weight - found.dense()) == pytest.approx(min(errors.values()), rel=1e-5)


def test_a_rotation_has_no_power_over_a_truncation() -> None:
    weight, moment = outliers(), moment_of()
    for rank in (5, 20):
        plain = fit(weight, Spec("svd", (rank,)), CoreFormat(32), moment=moment).dense()
        rotated = fit(weight, Spec("disentangled", (rank,), MODES), CoreFormat(32), moment=moment).dense()
        assert moment.squared(weight - rotated) == pytest.approx(moment.squared(weight - plain), rel=1e-4)


def test_the_rotated_moment_reaches_the_cores() -> None:
    weight, moment = outliers(), moment_of()
    seen: dict[str, SecondMoment | None] = {}

    def finish(name: str, core: NDArray[Any], core_moment: SecondMoment | None) -> NDArray[Any]:
        seen[name] = core_moment
        return core

    disentangled.factorize(weight, Spec("disentangled", (), MODES), moment, finish)
    assert seen["rotation"] is None
    turned = seen["backbone"]
    assert turned is not None
    np.testing.assert_allclose(np.linalg.eigvalsh(turned.matrix), np.linalg.eigvalsh(moment.matrix), rtol=1e-6)


def test_only_the_whole_form_is_suggested() -> None:
    whole = Spec("disentangled", (), ((384, 1), (1, 12), (1, 32)))
    assert disentangled.suggest(384, 384, 1.0, 32) == [whole]
    assert disentangled.suggest(384, 384, 0.9, 32) == []
    assert disentangled.suggest(384, 48, 1.0, 32) == [], "48 inputs have no group of a multiple of 32"
