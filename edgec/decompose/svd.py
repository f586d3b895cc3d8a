"""Low rank: W ≈ A B with A [out, r], B [r, in]; plain (Eckart–Young) or whitened by the input second moment H.

Whitened, it minimises ‖(W − W̃) H^½‖ (SVD-LLM, Wang et al. 2024, arXiv 2403.07378, §3.1): a tensor train of two
cores in split order, whose only cut is the SVD's, so `tensor_train` does the work. It has a file of its own
because it is the form that every runtime executes best, and because its rank is the one number that people want
to turn.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from edgec.contraction import Contraction
from edgec.decompose import Finish, tensor_train
from edgec.errors import PlanError
from edgec.moments import SecondMoment
from edgec.records import Spec

PLUGIN = True


def contraction(spec: Spec, out: int, in_: int) -> Contraction:
    """MatMul(core2 [r, in]) → MatMul(core1 [out, r])."""
    return tensor_train.contraction(_train(spec, out, in_), out, in_)


def factorize(weight: NDArray[Any], spec: Spec, moment: SecondMoment | None, finish: Finish) -> None:
    """weight [out, in] → core2 [r, in], then core1 [out, r] re-fitted to it. With a moment, B's outputs are
    uncorrelated and of unit variance, so that the blocks of A along r hold values of one size and quantise well.
    """
    out, in_ = weight.shape
    tensor_train.factorize(weight, _train(spec, out, in_), moment, finish)


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
