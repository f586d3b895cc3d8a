"""Tensor trains in any mode order (Oseledets 2011).

    W[o₁…o_d, i₁…i_d] ≈ Σ G₁[o₁, i₁, χ₁] G₂[χ₁, o₂, i₂, χ₂] … G_d[χ_{d−1}, o_d, i_d]

Mode order is data, not code: *interleaved* order ((o₁,i₁),(o₂,i₂),…) is the TT-matrix or MPO (Novikov et al.
2015); *split* order ((o₁,1),…,(1,i₁),…) puts all outputs before all inputs, so that its middle bond is the SVD
bond. Both, and everything between, share the one program and the one algorithm below.

The sweep runs from the input side, in the order in which x meets the cores, and keeps one invariant: after core k
the error of the whole is

    const + ‖(M − M̃) S^½‖²        S the second moment of what the cores so far make of x, M the best remaining matrix,

so each step is the same problem with a smaller matrix. Per step: choose the bond's subspace by a truncated SVD of
the unfolding (TT-SVD, Oseledets 2011, Algorithm 1, in the metric of the moment where the cut lets it factor, of
its marginals otherwise), let `finish` quantise the core, and re-fit the remainder by least squares to the core as
it became.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from edgec.contraction import Contraction, MatMul, Reshape, Step, Transpose
from edgec.decompose import Finish, _randomised
from edgec.decompose._metric import MAX_STATE, marginal, refit, ridged, right_singular
from edgec.errors import NumericsError, PlanError
from edgec.moments import SecondMoment
from edgec.records import Spec

PLUGIN = True

Array = NDArray[Any]

_DOUBLE_UP_TO = 1024
"""Smaller side up to which an unwhitened weight is decomposed in float64 [count]; larger ones in float32."""


def contraction(spec: Spec, out: int, in_: int) -> Contraction:
    """A chain of Reshape, MatMul and Transpose, input-side core first.

    The state between cores is [spectators, remaining inputs, χ]: outputs already made, inputs not yet met, the bond.
    """
    _check(spec, out, in_)
    steps: list[Step] = []
    trailing: tuple[int, ...] = (in_,)

    def reshape(*shape: int) -> None:
        nonlocal trailing
        shape = shape[1:] if len(shape) > 1 and shape[0] == 1 else shape
        if shape != trailing:
            steps.append(Reshape(shape))
            trailing = shape

    ranks = (1, *spec.ranks, 1)
    spectators = 1
    for k in range(len(spec.modes), 0, -1):
        o, i = spec.modes[k - 1]
        rows = spectators * math.prod(m[1] for m in spec.modes[: k - 1])
        reshape(rows, i * ranks[k])
        steps.append(MatMul(f"core{k}", o * ranks[k - 1], i * ranks[k]))
        trailing = (*trailing[:-1], o * ranks[k - 1])
        if o > 1 and rows > 1:
            reshape(rows, o, ranks[k - 1])
            steps.append(Transpose((1, 0, 2)))
            trailing = (o, rows, ranks[k - 1])
        spectators *= o
    reshape(out)
    return Contraction(out, in_, tuple(steps))


def max_ranks(modes: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The largest useful χ of every cut, output side first: the smaller side of its unfolding."""
    sizes = [o * i for o, i in modes]
    return tuple(min(math.prod(sizes[:cut]), math.prod(sizes[cut:])) for cut in range(1, len(sizes)))


def size(modes: Sequence[tuple[int, int]], ranks: Sequence[int]) -> int:
    """Parameters of a train's cores [count]."""
    padded = (1, *ranks, 1)
    return sum(padded[k] * o * i * padded[k + 1] for k, (o, i) in enumerate(modes))


def _check(spec: Spec, out: int, in_: int) -> None:
    if len(spec.modes) < 2 or len(spec.ranks) != len(spec.modes) - 1:
        raise PlanError(f"a tensor train of d ≥ 2 modes needs d − 1 ranks; got {spec}")
    outs, ins = math.prod(o for o, _ in spec.modes), math.prod(i for _, i in spec.modes)
    if (outs, ins) != (out, in_) or min(min(m) for m in spec.modes) < 1:
        raise PlanError(f"modes of {spec} multiply to {outs}x{ins}; the layer is {out}x{in_}")
    tops = max_ranks(spec.modes)
    for cut, (rank, top) in enumerate(zip(spec.ranks, tops, strict=True), start=1):
        if not 1 <= rank <= top:
            raise PlanError(f"rank {rank} at cut {cut} of {spec} is outside 1 … {top}, the cut's maximum")
    for cut, (rank, top) in enumerate(zip(spec.ranks, beside(spec.ranks, spec.modes), strict=True), start=1):
        if rank > top:
            raise PlanError(
                f"rank {rank} at cut {cut} of {spec} is above {top}, the cut's maximum beside its neighbours' ranks"
            )


def beside(ranks: Sequence[int], modes: Sequence[tuple[int, int]]) -> list[int]:
    """The largest χ of every cut that the cores on its two sides can carry, given the ranks of the cuts beside it."""
    padded, sizes = (1, *ranks, 1), [o * i for o, i in modes]
    return [min(padded[k] * sizes[k], padded[k + 2] * sizes[k + 1]) for k in range(len(ranks))]


def factorize(weight: Array, spec: Spec, moment: SecondMoment | None, finish: Finish) -> None:
    """weight [out, in] → core_k [o_k·χ_{k−1}, i_k·χ_k] for k = d … 1, each through `finish` as soon as it is known.

    Raises NumericsError when the weight is not finite or no factorization converges.
    """
    out, in_ = weight.shape
    _check(spec, out, in_)
    if not np.isfinite(weight).all():
        raise NumericsError("the weight holds NaN or Inf")
    ranks = (1, *spec.ranks, 1)
    remainder: Array = np.asarray(weight, dtype=np.float64 if min(out, in_) <= _DOUBLE_UP_TO else np.float32)
    h: Array | None = None if moment is None or moment.width > MAX_STATE else ridged(moment.matrix)
    for k in range(len(spec.modes), 1, -1):
        o, i = spec.modes[k - 1]
        s = i * ranks[k]
        left_in = math.prod(m[1] for m in spec.modes[: k - 1])
        m = remainder.reshape(-1, o, left_in, s)
        core = (
            _FIRST_BOND.get(weight, moment, m, h, ranks[k - 1]) if k == len(spec.modes) else _bond(m, h, ranks[k - 1])
        )
        core = core.transpose(1, 0, 2).reshape(o * ranks[k - 1], s)
        seen = np.asarray(finish(f"core{k}", core, marginal(h, left_in, s)), dtype=remainder.dtype)
        remainder, h = refit(m, h, seen.reshape(o, ranks[k - 1], s))
    finish("core1", remainder, None if h is None else SecondMoment(h))


def _bond(m: Array, h: Array | None, rank: int) -> Array:
    """Rows that span the best bond of m [O, o, I, s] between (O, I) and (o, s): core [χ, o, s].

    With h, the rows of the core are uncorrelated and of unit variance (exactly so where the moment factors across
    the cut).
    """
    outs, o, left, s = m.shape
    white, root = m, None
    if h is not None:
        h4 = h.reshape(left, s, left, s)
        root = SecondMoment(np.einsum("asat->st", h4) / left).root
        white = m @ root
        if left > 1:
            root_left = SecondMoment(np.einsum("asbs->ab", h4) / s).root
            white = np.einsum("oixs,xa->oias", white, root_left)
    rows = right_singular(white.transpose(0, 2, 1, 3).reshape(outs * left, o * s), rank).T
    if root is not None:  # back from whitened coordinates: rows · root⁻¹
        rows = solve_triangular(root, rows.reshape(-1, s).T, trans="T", lower=True, check_finite=False).T
    return np.asarray(rows.reshape(rank, o, s), dtype=m.dtype)


class _FirstBond:
    """Remembers the first bond of the last weight: scoring tries one weight at many ranks and formats, and the leading
    rows of one whole decomposition serve them all. A randomised one has no more rows than were asked for, so each rank
    keeps its own: what a fit gives must not depend on what was fitted before it. Keyed by identity, holding what it
    is keyed by.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._rows: dict[int, Array] = {}

    def get(self, weight: Array, moment: SecondMoment | None, m: Array, h: Array | None, rank: int) -> Array:
        if moment is None:  # a plain fit tries one rank; the whole decomposition would be wasted
            return _bond(m, h, rank)
        same = len(self._key) == 3 and self._key[0] is weight and self._key[1] is moment and self._key[2] == m.shape
        if not same:
            self._key, self._rows = (weight, moment, m.shape), {}
        outs, o, left, s = m.shape
        sides = (outs * left, o * s)
        kept = rank if _randomised.worthwhile(sides, rank) else min(sides)
        if kept not in self._rows:
            self._rows[kept] = _bond(m, h, kept)
        return self._rows[kept][:rank]


_FIRST_BOND = _FirstBond()


def suggest(out: int, in_: int, ratio: float, multiple: int) -> list[Spec]:
    """Trains of three cores in both split forms and of two in interleaved order, where the dimensions factor.

    Bonds inside a half are kept at a share of their maximum that matches the ratio; the planner prices and
    measures all of them.
    """
    specs: list[Spec] = []
    o1, o2 = _balanced(out, multiple)
    i1, i2 = _balanced(in_, multiple)
    if i1 > 1:
        specs += _fit(((out, 1), (1, i1), (1, i2)), out, in_, ratio, multiple)
    if o1 > 1:
        specs += _fit(((o1, 1), (o2, 1), (1, in_)), out, in_, ratio, multiple)
    if o1 > 1 and i1 > 1:
        specs += _fit(((o1, i1), (o2, i2)), out, in_, ratio, multiple)
    return specs


def exact(out: int, in_: int) -> list[Spec]:
    """Full ranks: split order with three cores and four, interleaved order, and one that mixes them."""
    (o1, o2), (i1, i2) = _balanced(out, 1), _balanced(in_, 1)
    orders = (
        ((out, 1), (1, i1), (1, i2)),
        ((o1, 1), (o2, 1), (1, i1), (1, i2)),
        ((o1, i1), (o2, i2)),
        ((1, i1), (o1, i2), (o2, 1)),
    )
    return [Spec("tensor_train", max_ranks(modes), modes) for modes in orders]


def _balanced(n: int, multiple: int) -> tuple[int, int]:
    """n = a·b with b a multiple of `multiple` and a ≤ b as large as possible; a = 1 where n does not factor so."""
    best = max((a for a in range(1, math.isqrt(n) + 1) if n % a == 0 and (n // a) % multiple == 0), default=1)
    return best, n // best


def _fit(modes: tuple[tuple[int, int], ...], out: int, in_: int, ratio: float, multiple: int) -> list[Spec]:
    """The largest ranks, all at one share of their maxima, whose cores hold at most ratio × out × in parameters."""
    tops = max_ranks(modes)
    for share in np.linspace(1.0, 0.02, 99):
        ranks = tuple(max(multiple, int(top * share) // multiple * multiple) for top in tops)
        for _ in tops:  # rounding breaks the proportion in which neighbours fit one another
            fitting = beside(ranks, modes)
            ranks = tuple(min(r, top // multiple * multiple) for r, top in zip(ranks, fitting, strict=True))
        if any(not 1 <= r <= top for r, top in zip(ranks, tops, strict=True)):
            return []
        if size(modes, ranks) <= ratio * out * in_:
            return [Spec("tensor_train", ranks, modes)]
    return []
