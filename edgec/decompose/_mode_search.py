"""Which mode factorization and order suit a weight: trains ranked by what their cuts would lose, without fitting any.

A cut of a train in row-major modes is settled by how much of the outputs and of the inputs lies to its left, so a few
dozen unfoldings serve hundreds of trains. What a train loses lies between the largest and the sum of what its cuts
lose (Oseledets 2011, Theorem 2.2); the sum is the score. Fitting every train was turned down: a second each.

Measured on block 4 of all-MiniLM-L6-v2 at 36/44/52 % of the parameters (functional error): searched trains
0.29/0.26/0.23, fixed split ones 0.41/0.40/0.40, interleaved ones 0.47/0.41/0.36, the low-rank form 0.27/0.24/0.21. The
search gains much over fixed modes and still does not reach the low-rank form: no planner runs it by default.

A moment weighs the columns by its diagonal, the one part of it that factors over every cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.decompose._lapack import eigenvalues
from edgec.decompose.tensor_train import beside, max_ranks, size
from edgec.moments import SecondMoment
from edgec.records import Spec

WORK = 2e10
"""Floating-point operations that the spectra may take, about a second on one core; or four times those of the SVD's
spectrum where that is more, in large layers. Trains beyond it are not looked at: counting work, not seconds, keeps
the result the same on every machine.
"""

_SPLITS = 5
"""Factorizations of one side into two that are tried, the most balanced first [count]."""

_STEPS = 48
"""Ranks that are tried per cut, about [count]."""

Array = NDArray[Any]
Modes = tuple[tuple[int, int], ...]


def search(
    weight: Array, moment: SecondMoment | None, ratio: float, multiple: int, *, best: int = 3
) -> list[tuple[Spec, float]]:
    """weight [out, in] → the `best` trains of at most ratio × out × in parameters, least error first, each with its
    predicted relative error; ranks are multiples of `multiple`. Plain low rank, which is not a train, is left out.
    """
    out, in_ = weight.shape
    w = np.asarray(weight, dtype=np.float32)
    if moment is not None:
        w = w * np.sqrt(moment.diagonal)
    whole = float((w.astype(np.float64) ** 2).sum())
    if not (np.isfinite(whole) and whole > 0):
        return []
    spectra = _Spectra(w)
    found: list[tuple[float, int, Spec]] = []
    for number, modes in enumerate(dict.fromkeys(_orders(out, in_))):
        tails = spectra.tails(modes)
        if tails is None:
            continue
        ranks = _ranks(modes, tails, ratio * out * in_, multiple)
        if ranks is not None:
            lost = sum(float(tail[rank]) for tail, rank in zip(tails, ranks, strict=True))
            found.append((math.sqrt(lost / whole), number, Spec("tensor_train", ranks, modes)))
    return [(spec, error) for error, _, spec in sorted(found, key=lambda f: f[:2])[:best]]


class _Spectra:
    """Σ of the squared singular values that a rank drops, by cut; the work spent on them so far."""

    def __init__(self, w: Array) -> None:
        self.w, self.spent = w, 0.0
        self.allowed = max(WORK, 4 * self._work(w.shape[0], 1))
        self.known: dict[tuple[int, int], Array] = {}

    def tails(self, modes: Modes) -> list[Array] | None:
        """Per cut [smaller side + 1]: squared error at every rank from 0; None where it would cost too much."""
        cuts = [(math.prod(o for o, _ in modes[:k]), math.prod(i for _, i in modes[:k])) for k in range(1, len(modes))]
        new = sum(self._work(*cut) for cut in set(cuts) - self.known.keys())
        if self.spent + new > self.allowed:
            return None
        self.spent += new
        for cut in cuts:
            if cut not in self.known:
                self.known[cut] = self._tail(*cut)
        return [self.known[cut] for cut in cuts]

    def _work(self, o: int, i: int) -> float:
        """Gram matrix of the smaller side m, and its eigenvalues: 2 m · out · in + 4 m³ (they run at a third of
        the speed of a product)."""
        m = min(o * i, self.w.size // (o * i))
        return 2.0 * m * self.w.size + 4.0 * m**3

    def _tail(self, o: int, i: int) -> Array:
        out, in_ = self.w.shape
        unfolded = self.w.reshape(o, out // o, i, in_ // i).transpose(0, 2, 1, 3).reshape(o * i, -1)
        gram = unfolded @ unfolded.T if len(unfolded) <= unfolded.shape[1] else unfolded.T @ unfolded
        squares = np.maximum(eigenvalues(gram), 0).astype(np.float64)
        return np.concatenate([[0.0], np.cumsum(squares)])[::-1]


def _ranks(modes: Modes, tails: list[Array], limit: float, multiple: int) -> tuple[int, ...] | None:
    """From full ranks down, always the step that costs least error for the parameters that it saves.

    Without the rule that no core may be square, weights without inner structure (most are) would get the low-rank
    form with useless cores.
    """
    ranks = [top // multiple * multiple for top in max_ranks(modes)]
    steps = [max(multiple, rank // _STEPS // multiple * multiple) for rank in ranks]
    if min(ranks) < multiple:
        return None
    while True:
        for _ in ranks:  # neighbours carry one another, and a core that is square can be absorbed by its neighbour
            tops = [(top - 1) // multiple * multiple for top in beside(ranks, modes)]
            ranks = [min(rank, top) for rank, top in zip(ranks, tops, strict=True)]
        if min(ranks) < multiple:
            return None
        before = size(modes, ranks)
        if before <= limit:
            return tuple(ranks)
        prices = []
        for cut, rank in enumerate(ranks):
            lower = max(rank - steps[cut], multiple)
            if lower < rank:
                saved = before - size(modes, [*ranks[:cut], lower, *ranks[cut + 1 :]])
                prices.append((float(tails[cut][lower] - tails[cut][rank]) / saved, cut, lower))
        if not prices:
            return None
        _, cut, lower = min(prices)
        ranks[cut] = lower


def _pairs(n: int) -> list[tuple[int, int]]:
    """n = a·b, both above 1, the most balanced first."""
    pairs = [(a, n // a) for a in range(2, n // 2 + 1) if n % a == 0]
    return sorted(pairs, key=lambda p: (abs(math.log(p[0] / p[1])), p))[: 2 * _SPLITS]


def _orders(out: int, in_: int) -> Iterator[Modes]:
    """Split orders first (their spectra are cheap), then mixed, then interleaved; two to four cores."""
    outs, ins = _pairs(out), _pairs(in_)
    yield from (((out, 1), (1, a), (1, b)) for a, b in ins)
    yield from (((a, 1), (b, 1), (1, in_)) for a, b in outs)
    yield from (((a, 1), (b, 1), (1, c), (1, d)) for a, b in outs for c, d in ins)
    yield from (((1, a), (out, 1), (1, b)) for a, b in ins)
    yield from (((a, 1), (1, in_), (b, 1)) for a, b in outs)
    few_outs, few_ins = outs[:_SPLITS], ins[:_SPLITS]
    yield from (((a, 1), (b, c), (1, d)) for a, b in few_outs for c, d in few_ins)
    yield from (((a, c), (b, d)) for a, b in few_outs for c, d in few_ins)
    yield from (((1, c), (a, d), (b, 1)) for a, b in few_outs for c, d in few_ins)
    for a, b in few_outs[:2]:
        for c, d in few_ins[:2]:
            for e, f in _pairs(b)[:1]:
                for g, h in _pairs(d)[:1]:
                    yield ((a, c), (e, g), (f, h))
