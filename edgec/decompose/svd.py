"""Low rank: W ≈ A B with A [out, r], B [r, in]; plain (Eckart–Young) or whitened by the input second moment H.

Whitened, it minimises ‖(W − W̃) H^½‖ (SVD-LLM, Wang et al. 2024, arXiv 2403.07378, §3.1): a tensor train of two
cores in split order, whose only cut is the SVD's, so `tensor_train` does the work. It has a file of its own
because it is the form that every runtime executes best, and because its rank is the one number that people want
to turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.contraction import Contraction
from edgec.decompose import Finish, tensor_train
from edgec.decompose._lapack import eigenpairs
from edgec.decompose._metric import MAX_STATE, marginal, refit, ridged
from edgec.errors import NumericsError, PlanError
from edgec.moments import SecondMoment
from edgec.records import Spec

PLUGIN = True

_TALL_VALUES = 1 << 27
"""Size from which a tall weight is read some rows at a time [count]; only heads of large vocabularies reach it."""

_ROWS = 1 << 13
"""Rows of a tall weight that are in float32 at a time [count]."""


def contraction(spec: Spec, out: int, in_: int) -> Contraction:
    """MatMul(core2 [r, in]) → MatMul(core1 [out, r])."""
    return tensor_train.contraction(_train(spec, out, in_), out, in_)


def factorize(weight: NDArray[Any], spec: Spec, moment: SecondMoment | None, finish: Finish) -> None:
    """weight [out, in] → core2 [r, in], then core1 [out, r] re-fitted to it. With a moment, B's outputs are
    uncorrelated and of unit variance, so that the blocks of A along r hold values of one size and quantise well.
    """
    out, in_ = weight.shape
    if weight.size > _TALL_VALUES and out > 4 * in_:
        _factorize_tall(weight, spec, moment, finish)
    else:
        tensor_train.factorize(weight, _train(spec, out, in_), moment, finish)


def _factorize_tall(weight: NDArray[Any], spec: Spec, moment: SecondMoment | None, finish: Finish) -> None:
    """The train's sweep with A as the only other matrix as tall as the weight, which may be memory-mapped fp16.

    B depends on the weight through WᵀW alone, so a square R with RᵀR = WᵀW stands in for it; and the re-fit is
    linear in the weight: A = W X with the X [in, r] that it gives for the identity.
    """
    out, in_ = weight.shape
    contraction(spec, out, in_)  # refuses ranks that do not fit
    rank = spec.ranks[0]
    gram = np.zeros((in_, in_))
    with np.errstate(over="ignore", invalid="ignore"):
        for _, part in _slabs(weight):
            gram += part.T @ part
    if not np.isfinite(gram).all():
        raise NumericsError("the weight holds NaN or Inf, or its square overflows")
    values, vectors = eigenpairs(gram, lean=True)
    stand_in = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    h = None if moment is None or moment.width > MAX_STATE else ridged(moment.matrix)
    core = tensor_train._bond(stand_in.reshape(in_, 1, 1, in_), h, rank).reshape(rank, in_)
    seen = np.asarray(finish("core2", core, marginal(h, 1, in_)), np.float64)
    onto, second = refit(np.eye(in_).reshape(in_, 1, 1, in_), h, seen.reshape(1, rank, in_))
    onto = onto.astype(np.float32)
    left = np.empty((out, rank), np.float32)
    for start, part in _slabs(weight):
        left[start : start + len(part)] = part @ onto
    finish("core1", left, None if second is None else SecondMoment(second))


def _slabs(weight: NDArray[Any]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for start in range(0, len(weight), _ROWS):
        yield start, np.asarray(weight[start : start + _ROWS], np.float32)


def suggest(out: int, in_: int, ratio: float, multiple: int) -> list[Spec]:
    """The one rank whose parameters come closest to ratio × out × in from below; none where that saves nothing."""
    rank = int(ratio * out * in_ / (out + in_)) // multiple * multiple
    if rank < multiple or rank * (out + in_) >= out * in_:
        return []
    return [Spec("svd", (rank,))]


def exact(out: int, in_: int) -> list[Spec]:
    """Full rank."""
    return [Spec("svd", (min(out, in_),))]


def _train(spec: Spec, out: int, in_: int) -> Spec:
    if len(spec.ranks) != 1 or spec.modes:
        raise PlanError(f"svd takes exactly one rank and no modes; got {spec}")
    return Spec("tensor_train", spec.ranks, ((out, 1), (1, in_)))
