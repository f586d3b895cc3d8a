"""A low-bit backbone and a low-rank correction: W ≈ Q + A B with Q [out, in], A [out, r], B [r, in].

What two bits get wrong about a weight is not noise in the metric of the inputs: a good part of it lies in few
directions, and a low-rank matrix of more bits says it. Q and A B are found in turns, as in CALDERA (Saha et al. 2024,
arXiv 2405.18886, Algorithm 1): Q quantises W − A B (by GPTQ where there is a second moment), and A B is the whitened
truncated SVD of W − Q. The first turn alone is LQER (Zhang et al. 2024, arXiv 2402.02446). Every turn sees all three
cores as the runtime will, the low-bit ones of the correction included, and the error watched is the one that ships.

Starting from the leading part of W instead of from A B = 0, so that the backbone is left with what is small, was
tried and turned down: the error after eight turns was 14 % larger (MiniLM, two layers, int2-b128+int4-b32, r = 32).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from edgec.contraction import Contraction, MatMul, Sum
from edgec.decompose import Finish
from edgec.decompose._metric import MAX_STATE, right_singular, solve
from edgec.errors import NumericsError, PlanError
from edgec.moments import SecondMoment
from edgec.records import Spec

PLUGIN = True

Array = NDArray[Any]

TURNS = 6
"""Most turns of quantising the backbone and fitting the correction [count]. On four layers of MiniLM, six leave 5 to
15 % less error than one; sixteen, on two of them, took another 2 to 3 % off.
"""

_LARGE = 1 << 22
"""Weights beyond this size [values] take two turns, in float32: one is a whole GPTQ and a whole decomposition."""


def contraction(spec: Spec, out: int, in_: int) -> Contraction:
    """MatMul(backbone [out, in]) + (MatMul(core2 [r, in]) → MatMul(core1 [out, r]))."""
    if len(spec.ranks) != 1 or spec.modes:
        raise PlanError(f"a residual takes exactly one rank and no modes; got {spec}")
    (rank,), top = spec.ranks, min(out, in_)
    if not 1 <= rank <= top:
        raise PlanError(f"rank {rank} of {spec} is outside 1 … {top}, the cut's maximum")
    backbone, correction = MatMul("backbone", out, in_), (MatMul("core2", rank, in_), MatMul("core1", out, rank))
    return Contraction(out, in_, (Sum(((backbone,), correction)),))


def factorize(weight: Array, spec: Spec, moment: SecondMoment | None, finish: Finish) -> None:
    """weight [out, in] → backbone [out, in], core2 [r, in], core1 [out, r]; each is finished once a turn.

    Raises NumericsError when the weight is not finite.
    """
    contraction(spec, *weight.shape)
    if not np.isfinite(weight).all():
        raise NumericsError("the weight holds NaN or Inf")
    w = np.asarray(weight, dtype=np.float64 if weight.size <= _LARGE else np.float32)
    start = best = np.zeros_like(w)
    least, last = np.inf, False
    for _ in range(TURNS if weight.size <= _LARGE else min(TURNS, 2)):
        after, error = _turn(w, start, spec.ranks[0], moment, finish)
        if last := error < least:
            best, least = start, error
        if error == 0:
            break
        start = after
    if not last:  # rounding makes a turn worse now and then, and the last call of a name stands: the best one again
        _turn(w, best, spec.ranks[0], moment, finish)


def _turn(
    w: Array, correction: Array, rank: int, moment: SecondMoment | None, finish: Finish
) -> tuple[Array, float]:
    """Backbone to W − correction, then the correction to W − backbone: the new one [out, in], and the error left."""
    rest = w - finish("backbone", w - correction, moment)
    root = None if moment is None or moment.width > MAX_STATE else moment.root
    white = rest if root is None else rest @ root
    rows = right_singular(white, rank)
    size = float(np.linalg.norm(white @ rows))  # of A, while the rows of B have length 1 or meet unit variance
    if root is not None:  # back from whitened coordinates
        rows = solve_triangular(root, rows, trans="T", lower=True, check_finite=False)
    rows *= _balance(size / w.shape[0] ** 0.5, float(np.linalg.norm(rows)) / w.shape[1] ** 0.5)
    b = np.asarray(finish("core2", rows.T, None if root is None else moment), dtype=w.dtype)
    seen = b if root is None else b @ root
    second = seen @ seen.T  # of what B makes of the inputs: the metric in which A is fitted and quantised
    a = finish("core1", solve(second, white @ seen.T), None if root is None else SecondMoment(second))
    a = np.asarray(a, dtype=w.dtype)
    left = white - a @ seen
    return a @ b, float(np.vdot(left, left))


def _balance(a: float, b: float) -> float:
    """The power of two that brings numbers of size a down, and of size b up, to meet: what is left of a weight is
    small, and all of it in one core, the core's scales would fall below fp16's normal range and be stored as fp32.
    """
    return float(2.0 ** np.rint(0.5 * np.log2(a / b))) if a > 0 and b > 0 else 1.0


def suggest(out: int, in_: int, ratio: float, multiple: int) -> list[Spec]:
    """The one rank whose parameters, those of the backbone included, come closest to ratio × out × in from below:
    nothing for a ratio that leaves no room beside the backbone. Ranks above a sixth of the smaller side are not
    suggested: there, more bits for the backbone are the better buy.
    """
    rank = int((ratio - 1) * out * in_ / (out + in_)) // multiple * multiple
    return [Spec("residual", (rank,))] if multiple <= rank <= max(multiple, min(out, in_) // 6) else []


def exact(out: int, in_: int) -> list[Spec]:
    """Any rank loses nothing where the backbone is stored in floats; the full one is what a truncation starts from."""
    return [Spec("residual", (min(out, in_),))]
