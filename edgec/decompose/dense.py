"""No decomposition at all: the weight is its only core. Quantised, it is the rival that every kind has to beat."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from edgec.contraction import Contraction, MatMul
from edgec.decompose import Finish
from edgec.errors import PlanError
from edgec.moments import SecondMoment
from edgec.records import Spec

PLUGIN = True


def contraction(spec: Spec, out: int, in_: int) -> Contraction:
    if spec.ranks or spec.modes:
        raise PlanError(f"a dense layer has neither ranks nor modes; got {spec}")
    return Contraction(out, in_, (MatMul("weight", out, in_),))


def factorize(weight: NDArray[Any], spec: Spec, moment: SecondMoment | None, finish: Finish) -> None:
    """weight [out, in] → core "weight" [out, in]."""
    finish("weight", weight, moment)


def suggest(out: int, in_: int, ratio: float, multiple: int) -> list[Spec]:
    return [Spec("dense")] if ratio >= 1 else []


def exact(out: int, in_: int) -> list[Spec]:
    return [Spec("dense")]
