"""Tucker forms: what they must find, and that each core is fitted to what the earlier ones became."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgec.contraction import core_shapes, parameters
from edgec.decompose import tucker
from edgec.errors import PlanError
from edgec.fit import contraction_of, fit
from edgec.moments import SecondMoment
from edgec.quantize import descent
from edgec.quantize.formats import CoreFormat
from edgec.records import Spec

FP32 = CoreFormat(32)
MODES = ((4, 1), (6, 1), (1, 5), (1, 8))


def low(sizes: tuple[int, ...], ranks: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    """A tensor of exactly these multilinear ranks, as a matrix [4·6, 5·8]."""
    generator = np.random.default_rng(seed)
    tensor: NDArray[Any] = generator.standard_normal(ranks)
    for axis, (n, r) in enumerate(zip(sizes, ranks, strict=True)):
        tensor = np.moveaxis(np.tensordot(tensor, generator.standard_normal((n, r)), axes=(axis, 1)), -1, axis)
    return tensor.reshape(24, 40).astype(np.float32)


def moment_of(width: int, seed: int = 3) -> SecondMoment:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((6 * width, width)) @ (generator.standard_normal((width, width)) / 4 + np.eye(width))
    return SecondMoment(x.T @ x / len(x))


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("ranks", [(2, 3, 2, 3), (4, 3, 5, 2), (2, 6, 3, 8), (1, 1, 1, 1)])
def test_a_weight_of_low_multilinear_rank_is_found(ranks: tuple[int, ...], whitened: bool) -> None:
    weight = low((4, 6, 5, 8), ranks)
    factors = fit(weight, Spec("tucker", ranks, MODES), FP32, moment=moment_of(40) if whitened else None)
    assert np.linalg.norm(weight - factors.dense()) <= 1e-4 * np.linalg.norm(weight)


def test_tucker_2_of_a_matrix_is_its_svd() -> None:
    weight, moment = np.random.default_rng(1).standard_normal((24, 40)).astype(np.float32), moment_of(40)
    for r in (3, 10):
        plain = fit(weight, Spec("svd", (r,)), FP32, moment=moment).dense()
        found = fit(weight, Spec("tucker", (r, r)), FP32, moment=moment).dense()
        assert moment.squared(weight - found) == pytest.approx(moment.squared(weight - plain), rel=1e-4)


def test_modes_that_keep_their_size_have_no_factor() -> None:
    contraction = contraction_of(Spec("tucker", (4, 3, 5, 8), MODES), (24, 40), "linear")
    assert core_shapes(contraction) == {"core": (12, 40), "output2": (6, 3)}
    assert parameters(contraction) == 12 * 40 + 6 * 3
    assert set(core_shapes(contraction_of(Spec("tucker", (4, 6, 5, 8), MODES), (24, 40), "linear"))) == {"core"}


def test_iterations_do_not_lose_to_the_truncated_hosvd(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(2).standard_normal((24, 40)).astype(np.float32)
    spec = Spec("tucker", (2, 3, 3, 4), MODES)
    errors = []
    for sweeps in (0, 1, 4):
        monkeypatch.setattr(tucker, "_SWEEPS", sweeps)
        errors.append(np.linalg.norm(weight - fit(weight, spec, FP32).dense()))
    assert errors[0] >= errors[1] - 1e-6
    assert errors[1] >= errors[2] - 1e-6


@pytest.mark.parametrize("modes", [(), MODES])
def test_refitting_to_the_quantised_cores_pays(modes: tuple[tuple[int, int], ...]) -> None:
    spec = Spec("tucker", (12, 12) if not modes else (3, 4, 4, 6), modes)
    moment, better = moment_of(40), 0
    for seed in range(5):
        weight = np.random.default_rng(seed).standard_normal((24, 40)).astype(np.float32)
        errors = []
        for feedback in (True, False):
            stored: dict[str, NDArray[Any]] = {}

            def finish(
                name: str,
                core: NDArray[Any],
                core_moment: SecondMoment | None,
                stored: dict[str, NDArray[Any]] = stored,
                feedback: bool = feedback,
            ) -> NDArray[Any]:
                stored[name] = descent.quantize(core, CoreFormat.parse("int2-b16"), core_moment).dequantize()
                return stored[name] if feedback else core

            tucker.factorize(weight, spec, moment, finish)
            contraction = contraction_of(spec, (24, 40), "linear")
            from edgec.contraction import dense

            errors.append(moment.squared(weight - dense(contraction, stored)))
        better += errors[0] < errors[1]
    assert better >= 4


@pytest.mark.parametrize(
    ("modes", "ranks", "message"),
    [
        (((4, 5), (6, 8)), (2, 2), "not in split order"),
        (((2, 1), (2, 1), (6, 1), (1, 40)), (1, 1, 1, 1), "not in split order"),
        (MODES, (2, 3), "needs as many ranks"),
        (MODES, (4, 1, 1, 2), "beside the other modes"),
    ],
)
def test_forms_that_do_not_exist_are_refused(
    modes: tuple[tuple[int, int], ...], ranks: tuple[int, ...], message: str
) -> None:
    assert (prod(o for o, _ in modes), prod(i for _, i in modes)) == (24, 40)
    with pytest.raises(PlanError, match=message):
        contraction_of(Spec("tucker", ranks, modes), (24, 40), "linear")
