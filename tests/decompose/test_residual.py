"""A quantised backbone with a low-rank correction: what it buys, what its turns do, and what is stored in the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgec.contraction import parameters
from edgec.decompose import residual
from edgec.errors import NumericsError, PlanError
from edgec.fit import fit, stored_bytes
from edgec.moments import SecondMoment
from edgec.quantize.formats import LayerFormat, QuantizedTensor
from edgec.records import Spec

Array = NDArray[Any]
PAIR, FOUR = LayerFormat.parse("int2-b64+int4-b16"), LayerFormat.parse("int4-b16")


def weight_of(out: int, in_: int, seed: int) -> NDArray[np.float32]:
    """A few strong directions over noise, as trained weights have them."""
    generator = np.random.default_rng(seed)
    strong = generator.standard_normal((out, 6)) @ generator.standard_normal((6, in_))
    return (0.5 * strong + generator.standard_normal((out, in_))).astype(np.float32)


def moment_of(width: int, seed: int) -> SecondMoment:
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((width, width)) * np.exp(-np.arange(width) * 4 / width)
    x = generator.standard_normal((4 * width, width)) @ mixing.T
    return SecondMoment(x.T @ x / len(x))


def error_of(weight: Array, spec: Spec, fmt: LayerFormat, moment: SecondMoment | None) -> float:
    difference = weight - fit(weight, spec, fmt, moment=moment).dense()
    return moment.squared(difference) if moment is not None else float((difference**2).sum())


@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_correction_pays_for_itself(seed: int, whitened: bool) -> None:
    """Better than the backbone alone, and than two low-rank cores of as many bytes."""
    weight, moment = weight_of(96, 128, seed), moment_of(128, seed + 10) if whitened else None
    spec = Spec("residual", (16,))
    size = stored_bytes(spec, (96, 128), "linear", PAIR)
    rank = next(r for r in range(96, 0, -1) if stored_bytes(Spec("svd", (r,)), (96, 128), "linear", FOUR) <= size)
    found = error_of(weight, spec, PAIR, moment)
    assert found < 0.8 * error_of(weight, Spec("dense"), LayerFormat.parse("int2-b64"), moment)
    assert found < 0.8 * error_of(weight, Spec("svd", (rank,)), FOUR, moment)


@pytest.mark.parametrize(("whitened", "mean"), [(False, 0.8), (True, 0.99)])
def test_turns_reduce_the_error(whitened: bool, mean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = []
    for seed in range(4):
        weight, moment = weight_of(96, 128, seed), moment_of(128, seed + 10) if whitened else None
        errors = []
        for turns in (1, residual.TURNS):
            monkeypatch.setattr(residual, "TURNS", turns)
            errors.append(error_of(weight, Spec("residual", (4,)), PAIR, moment))
        monkeypatch.undo()
        ratios.append(errors[1] / errors[0])
    assert max(ratios) <= 1 + 1e-9  # never worse than the first turn
    assert np.mean(ratios) < mean


@settings(max_examples=20, deadline=None)
@given(
    out=st.integers(1, 40),
    in_=st.integers(1, 40),
    seed=st.integers(0, 1000),
    turns=st.integers(1, 8),
    whitened=st.booleans(),
)
def test_more_turns_are_never_worse(out: int, in_: int, seed: int, turns: int, whitened: bool) -> None:
    """Rounding makes single turns worse now and then; the one that stands is the best of them."""
    weight, moment = weight_of(out, in_, seed), moment_of(in_, seed) if whitened else None
    spec, fmt = Spec("residual", (max(1, min(out, in_) // 4),)), LayerFormat.parse("int2-b16+int4-b16")
    errors = []
    with pytest.MonkeyPatch.context() as patch:
        for count in (turns, turns + 1):
            patch.setattr(residual, "TURNS", count)
            errors.append(error_of(weight, spec, fmt, moment))
    assert errors[1] <= errors[0] * (1 + 1e-4) + 1e-9


def test_cores_are_stored_in_the_formats_of_the_pair() -> None:
    factors = fit(weight_of(96, 128, 0), Spec("residual", (16,)), PAIR, moment=moment_of(128, 1))
    cores = factors.cores
    assert list(cores) == ["backbone", "core2", "core1"]
    assert all(isinstance(core, QuantizedTensor) for core in cores.values())
    assert {name: str(core.fmt) for name, core in cores.items() if isinstance(core, QuantizedTensor)} == {
        "backbone": "int2-b64",
        "core2": "int4-b16",
        "core1": "int4-b16",
    }
    values = factors.values()
    np.testing.assert_allclose(
        factors.dense(), values["backbone"] + values["core1"] @ values["core2"], rtol=1e-4, atol=1e-4
    )
    assert factors.stored_bytes == stored_bytes(Spec("residual", (16,)), (96, 128), "linear", PAIR)
    assert factors.stored_bytes == 96 * 2 * (16 + 2) + 16 * 8 * (8 + 2) + 96 * (8 + 2)


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 3000),
    in_=st.integers(1, 3000),
    ratio=st.floats(0.1, 2.0),
    multiple=st.sampled_from([1, 8, 32]),
)
def test_suggestions_count_the_backbone(out: int, in_: int, ratio: float, multiple: int) -> None:
    for spec in residual.suggest(out, in_, ratio, multiple):
        (rank,) = spec.ranks
        assert rank % multiple == 0
        assert multiple <= rank <= max(multiple, min(out, in_) / 6)
        assert parameters(residual.contraction(spec, out, in_)) <= ratio * out * in_ + 1e-6
    if ratio <= 1:
        assert residual.suggest(out, in_, ratio, multiple) == []


def test_suggestions_are_small_ranks() -> None:
    assert residual.suggest(384, 384, 1.2, 32) == [Spec("residual", (32,))]
    assert residual.suggest(384, 1536, 1.22, 32) == [Spec("residual", (64,))]
    assert residual.suggest(384, 384, 1.05, 32) == []
    assert residual.suggest(16, 16, 1.9, 32) == []  # the rank would be larger than the matrix


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PlanError, match="exactly one rank"):
        residual.contraction(Spec("residual", (2, 2)), 8, 8)
    with pytest.raises(PlanError, match="rank 9 .* outside 1 … 8"):
        fit(weight_of(8, 16, 0), Spec("residual", (9,)), PAIR)
    weight = weight_of(8, 16, 0).astype(np.float64)
    weight[0, 0] = np.nan
    with pytest.raises(NumericsError, match="NaN or Inf"):
        residual.factorize(weight, Spec("residual", (2,)), None, lambda name, core, moment: core)


@pytest.mark.parametrize("whitened", [True, False])
def test_large_weights_take_two_turns_in_single_precision(whitened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = weight_of(96, 128, 0), moment_of(128, 1) if whitened else None
    spec, turns = Spec("residual", (4,)), []
    monkeypatch.setattr(residual, "TURNS", 2)
    expected = error_of(weight, spec, PAIR, moment)
    monkeypatch.undo()
    monkeypatch.setattr(residual, "_LARGE", weight.size - 1)
    assert error_of(weight, spec, PAIR, moment) == pytest.approx(expected, rel=0.02)

    def finish(name: str, core: Array, core_moment: SecondMoment | None) -> Array:
        turns.append(name)
        return np.round(core)

    residual.factorize(weight, spec, moment, finish)
    assert turns.count("backbone") <= 3  # the best one again, where the second is worse
