"""Canonical polyadic (CP) decomposition of a weight whose outputs and inputs are split into modes.

    W[o₁ o₂, i₁ i₂] ≈ Σ_r B[o₂, r] a[o₁, r] c[i₁, r] D[i₂, r]

It is a low-rank form whose r input vectors are outer products, c_r ⊗ D_r (and likewise its output vectors), so it
affords a larger r for its parameters. x never meets W:

    Reshape (i₁, i₂) → MatMul(D [r, i₂]) → Scale(c [i₁·r]) → ReduceSum(i₁)                      z [r]
    z → MatMul(spread [o₁, 1]) → Scale(a [r·o₁]) → Transpose → MatMul(B [o₂, r]) → Reshape      y [out]

`spread` is a column of ones: the steps have a sum over an axis but no repetition along one, and a product with ones
is that. It costs one number per o₁; ones are exact in every format (with zero points, all of one size near 1, which
`outer_scale` makes up for). FLOPs are those of a low-rank form of rank r where the outputs are one mode, 2 r (in +
out) and two for every scale; also with two output modes, where r meets o₂, o₁ times. Modes that are 1, and the steps
that they would need, are left out. Two modes are refused: a matrix's CP is its SVD.

Fitted by alternating least squares (Kolda & Bader 2009, §3.4), each step damped towards the factor that it replaces
(proximal; Uschmajew 2012), so that the error cannot rise however dependent the r terms are. The metric is the input
moment's: through its marginals while iterating, exactly in the fit of the last core. A factor in the full metric
while iterating was turned down: its normal equations have (i₁ r)² entries.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular

from edgec.contraction import Contraction, MatMul, ReduceSum, Reshape, Scale, Step, Transpose, parameters
from edgec.decompose import Finish
from edgec.decompose._metric import MAX_STATE, marginal, marginal_roots, ridged, solve
from edgec.decompose._modes import balanced, split
from edgec.errors import NumericsError, PlanError
from edgec.moments import SecondMoment
from edgec.records import Spec

PLUGIN = True

SEARCHED = False
"""Mean functional error over block 4 of all-MiniLM-L6-v2 at 36/44/52 % of the parameters: 0.37/0.32/0.29,
where the low-rank form loses 0.27/0.24/0.21, at half the FLOPs and a tenth of the time to fit.
"""

_SWEEPS = 24
"""Rounds of alternating least squares at most [count]."""

_ENOUGH = 1e-4
"""A round that lowers the squared error by less than this share of it is the last."""

_PULL = 1e-7
"""Weight of the previous factor in the next one, as a share of the normal matrix's mean diagonal."""

Array = NDArray[Any]


def contraction(spec: Spec, out: int, in_: int) -> Contraction:
    """Cores inner [r, i₂], inner_scale [i₁·r], spread [o₁, 1], outer_scale [r·o₁], outer [o₂, r]."""
    (o1, o2), (i1, i2), r = _check(spec, out, in_)
    steps: list[Step] = [Reshape((i1, i2))] if i1 > 1 else []
    steps.append(MatMul("inner", r, i2))
    if i1 > 1:
        steps += [Reshape((i1 * r,)), Scale("inner_scale", i1 * r), Reshape((i1, r)), ReduceSum(0)]
    if o1 > 1:
        steps += [Reshape((r, 1)), MatMul("spread", o1, 1), Reshape((r * o1,)), Scale("outer_scale", r * o1)]
        steps += [Reshape((r, o1)), Transpose((1, 0))]
    steps.append(MatMul("outer", o2, r))
    if o1 > 1:
        steps.append(Reshape((out,)))
    return Contraction(out, in_, tuple(steps))


def max_rank(sizes: tuple[int, ...]) -> int:
    """The rank at which any tensor of these mode sizes is exact: the product of all but the largest."""
    return math.prod(sizes) // max(sizes)


def _check(spec: Spec, out: int, in_: int) -> tuple[tuple[int, int], tuple[int, int], int]:
    outs, ins = split(spec, out, in_)
    if len(outs) + len(ins) < 3:
        raise PlanError(f"a CP form needs three or four modes (with two it is an svd); got {spec}")
    if len(spec.ranks) != 1:
        raise PlanError(f"a CP form has exactly one rank; got {spec}")
    top = max_rank((*outs, *ins))
    if not 1 <= spec.ranks[0] <= top:
        raise PlanError(f"rank {spec.ranks[0]} of {spec} is outside 1 … {top}, the cut's maximum")
    o1, o2 = (1, *outs)[-2:]
    i1, i2 = (1, *ins)[-2:]
    return (o1, o2), (i1, i2), spec.ranks[0]


def factorize(weight: Array, spec: Spec, moment: SecondMoment | None, finish: Finish) -> None:
    """weight [out, in] → the cores of `contraction`, each fitted to what the earlier ones became.

    Raises NumericsError when the weight is not finite or no factorization converges.
    """
    if not np.isfinite(weight).all():
        raise NumericsError("the weight holds NaN or Inf")
    (o1, o2), (i1, i2), rank = _check(spec, *weight.shape)
    w = np.asarray(weight, dtype=np.float64)
    h = None if moment is None or moment.width > MAX_STATE else ridged(moment.matrix)
    roots = marginal_roots(h, (i1, i2))
    white = w.reshape(o1, o2, i1, i2)
    if roots is not None:
        white = np.einsum("opij,ia->opaj", white, roots[0]) @ roots[1]
    factors = _ordered(als(white, rank))

    # A whitened input factor v stands for L⁻ᵀ v. Sizes move into factors[1], which leaves last.
    factors[1] *= _normalise(factors, 3)
    seen = np.asarray(finish("inner", _unwhiten(factors[3], roots, 1).T, marginal(h, i1, i2)), np.float64)
    factors[3] = seen.T if roots is None else roots[1].T @ seen.T
    scale = np.ones((1, rank))
    if i1 > 1:
        factors[2] = _mode_fit(white, factors, 2)
        factors[1] *= _normalise(factors, 2, factors[3])
        stored = finish("inner_scale", _unwhiten(factors[2], roots, 0).reshape(-1), None)
        scale = np.asarray(stored, dtype=np.float64).reshape(i1, rank)
        factors[2] = scale if roots is None else roots[0].T @ scale
    if o1 > 1:
        ones = np.asarray(finish("spread", np.ones((o1, 1), np.float32), None), dtype=np.float64)
        factors[0] = _mode_fit(white, factors, 0)
        factors[1] *= _normalise(factors, 0)
        stored = finish("outer_scale", (factors[0] / ones).T.reshape(-1), None)
        factors[0] = np.asarray(stored, dtype=np.float64).reshape(rank, o1).T * ones
    _last(w.reshape(o1, o2, -1), h, khatri_rao(scale, seen.T), factors, finish)


def _last(w: Array, h: Array | None, inner: Array, factors: list[Array], finish: Finish) -> None:
    """outer [o₂, r], exactly in the metric of h: z = innerᵀ x has the moment S, and the rows of `outer` meet diag(a) z.

    w [o₁, o₂, in], inner [in, r]. The change of factors[1] is what is solved for: where terms are dependent, the
    damping then costs nothing.
    """
    scale, outer = factors[0], factors[1]
    h_inner = inner if h is None else h @ inner
    second = (inner.T @ h_inner) * (scale.T @ scale)
    cross = np.einsum("opr,or->pr", w @ h_inner, scale)
    finish("outer", outer + solve(second, cross - outer @ second), SecondMoment(second / len(w)))


def _ordered(factors: list[Array]) -> list[Array]:
    """Largest terms first, so that blocks of quantised numbers hold ones of a size; modes of size 1 hold ones."""
    factors[1] = factors[1] * factors[0][0] if len(factors[0]) == 1 else factors[1]
    factors[3] = factors[3] * factors[2][0] if len(factors[2]) == 1 else factors[3]
    for mode in (0, 2):
        if len(factors[mode]) == 1:
            factors[mode] = np.ones_like(factors[mode])
    size = np.prod([np.linalg.norm(f, axis=0) for f in factors], axis=0)
    order = np.argsort(-size, kind="stable")
    return [np.ascontiguousarray(f[:, order]) for f in factors]


def _normalise(factors: list[Array], mode: int, beside: Array | None = None) -> Array:
    """Divide the columns of factors[mode] by their norms (times those of `beside`), in place; returns the divisors."""
    sizes = np.linalg.norm(factors[mode], axis=0)
    if beside is not None:
        sizes = sizes * np.linalg.norm(beside, axis=0)
    sizes = np.where(sizes > 0, sizes, 1.0)
    factors[mode] = factors[mode] / sizes
    return np.asarray(sizes)


def _unwhiten(factor: Array, roots: list[Array] | None, side: int) -> Array:
    if roots is None:
        return factor
    return np.asarray(solve_triangular(roots[side], factor, trans="T", lower=True, check_finite=False))


def khatri_rao(*factors: Array) -> Array:
    """Column-wise outer products: [n, r], [m, r], … → [n·m·…, r], the first index slowest."""
    result = factors[0]
    for factor in factors[1:]:
        result = (result[:, None] * factor[None]).reshape(-1, factor.shape[1])
    return result


def als(tensor: Array, rank: int) -> list[Array]:
    """CP factors [n_k, rank] of a tensor [n₁, …, n_d]. Deterministic; the error never rises from one round to the next.

    Starts from the best of several exact expansions cut at the largest `rank` terms (see `_start`), which is exact from
    `max_rank` on; a random start, usual for small ranks, was turned down for that reason.
    """
    factors = _start(tensor, rank)
    whole = float((tensor**2).sum())
    previous = np.inf
    for _ in range(_SWEEPS):
        for mode in range(tensor.ndim):
            if tensor.shape[mode] > 1:
                factors[mode] = _mode_fit(tensor, factors, mode)
        error = _squared_error(tensor, factors)
        if error <= 1e-12 * whole or previous - error <= _ENOUGH * previous:
            break
        previous = error
        _balance(factors)
    return factors


def _mode_fit(tensor: Array, factors: list[Array], mode: int) -> Array:
    """Least squares for one factor, the others fixed, pulled slightly towards what it was."""
    others = [f for k, f in enumerate(factors) if k != mode]
    normal = np.ones((factors[0].shape[1],) * 2)
    for factor in others:
        normal = normal * (factor.T @ factor)
    pull = _PULL * float(np.trace(normal)) / len(normal) + np.finfo(np.float64).tiny
    right = np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1) @ khatri_rao(*others)
    # Solved for the change, not the factor: where the terms are dependent, round-off then stays small beside it.
    right -= factors[mode] @ normal
    normal[np.diag_indices_from(normal)] += pull
    try:
        change = cho_solve(cho_factor(normal, lower=True, check_finite=False), right.T, check_finite=False).T
    except np.linalg.LinAlgError:
        return factors[mode]
    return np.asarray(factors[mode] + change)


def _squared_error(tensor: Array, factors: list[Array]) -> float:
    first = factors[0] @ khatri_rao(*factors[1:]).T
    return float(((tensor.reshape(len(tensor), -1) - first) ** 2).sum())


def _balance(factors: list[Array]) -> None:
    """Every term's size spread evenly over its factors, in place: normal matrices stay well scaled."""
    sizes = [np.linalg.norm(f, axis=0) for f in factors]
    whole = np.prod(sizes, axis=0)
    even = whole ** (1 / len(factors))
    for factor, size in zip(factors, sizes, strict=True):
        factor *= np.divide(even, size, out=np.zeros_like(even), where=size > 0)


def _start(tensor: Array, rank: int) -> list[Array]:
    """The best of these expansions into orthogonal rank-one terms, cut at its largest `rank` terms.

    For every pair of modes, the singular triplets of all slices along the others, times unit vectors there: exact with
    max_rank terms for a pair that holds the largest mode. And the singular triplets of the matrix (first half of
    the modes | second half), each vector expanded in turn: what finds terms that are orthogonal themselves. Terms of
    an expansion are orthogonal to one another, so its error is what the dropped ones weigh.
    """
    best: tuple[float, list[Array]] | None = None
    expansions = [_slices(tensor, pair, rank) for pair in combinations(range(tensor.ndim), 2)]
    for factors in [*expansions, _vectors(tensor, rank)]:
        kept = float(np.prod([(f**2).sum(axis=0) for f in factors], axis=0).sum())
        if best is None or kept > best[0] * (1 + 1e-9):
            best = kept, factors
    assert best is not None
    return best[1]


def _slices(tensor: Array, pair: tuple[int, int], rank: int) -> list[Array]:
    rest = [k for k in range(tensor.ndim) if k not in pair]
    slices = tensor.transpose(*rest, *pair).reshape(-1, *(tensor.shape[k] for k in pair))
    u, s, vt = np.linalg.svd(slices, full_matrices=False)
    order = np.argsort(-s.reshape(-1), kind="stable")[:rank]
    where, which = np.divmod(order, s.shape[1])
    columns, root = np.arange(len(order)), np.sqrt(s[where, which])
    factors = [np.zeros((n, rank)) for n in tensor.shape]
    factors[pair[0]][:, columns] = u[where, :, which].T * root
    factors[pair[1]][:, columns] = vt[where, which].T * root
    for k, index in zip(rest, np.unravel_index(where, [tensor.shape[k] for k in rest]), strict=True):
        factors[k][index, columns] = 1.0
    return factors


def _vectors(tensor: Array, rank: int) -> list[Array]:
    half = tensor.ndim // 2
    left, right = (1, *tensor.shape[:half])[-2:], tensor.shape[half:]
    u, s, vt = np.linalg.svd(tensor.reshape(math.prod(left), -1), full_matrices=False)
    pl, sl, ql = np.linalg.svd(u.T.reshape(-1, *left), full_matrices=False)
    pr, sr, qr = np.linalg.svd(vt.reshape(-1, *right), full_matrices=False)
    sizes = s[:, None, None] * sl[:, :, None] * sr[:, None, :]
    order = np.argsort(-sizes.reshape(-1), kind="stable")[:rank]
    k, a, b = np.unravel_index(order, sizes.shape)
    found = [pl[k, :, a], ql[k, a], pr[k, :, b], qr[k, b] * sizes.reshape(-1)[order, None]]
    factors = [np.zeros((n, rank)) for n in (*left, *right)]
    for factor, vectors in zip(factors, found, strict=True):
        factor[:, : len(order)] = vectors.T
    if tensor.ndim == 3:  # the mode of size 1 that stood in for a second output mode
        factors[1] = factors[1] * factors[0]
    return factors[-tensor.ndim :]


def suggest(out: int, in_: int, ratio: float, multiple: int) -> list[Spec]:
    """Inputs in two modes, and outputs and inputs in two each, at the largest rank that the ratio allows.

    i₂ is a multiple of `multiple`, since a quantised core meets it.
    """
    (o1, o2), (i1, i2) = balanced(out, multiple), balanced(in_, multiple)
    specs = []
    for modes in (((out, 1), (1, i1), (1, i2)), ((o1, 1), (o2, 1), (1, in_)), ((o1, 1), (o2, 1), (1, i1), (1, i2))):
        sizes = tuple(max(mode) for mode in modes)
        if min(sizes) == 1:
            continue
        spread = o1 if modes[1] == (o2, 1) else 0
        each = parameters(contraction(Spec("cp", (1,), modes), out, in_)) - spread
        rank = min(int(ratio * out * in_ - spread) // each, max_rank(sizes)) // multiple * multiple
        if rank >= multiple:
            specs.append(Spec("cp", (rank,), modes))
    return specs


def exact(out: int, in_: int) -> list[Spec]:
    """Inputs in two modes, outputs in two, and both, at the rank where any tensor is exact."""
    (o1, o2), (i1, i2) = balanced(out, 1), balanced(in_, 1)
    forms = (((out, 1), (1, i1), (1, i2)), ((o1, 1), (o2, 1), (1, in_)), ((o1, 1), (o2, 1), (1, i1), (1, i2)))
    return [Spec("cp", (max_rank(tuple(max(mode) for mode in modes)),), modes) for modes in forms]
