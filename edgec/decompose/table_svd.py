"""A lookup table in fewer columns: the id gathers a short row, one small matrix per band spreads it to full width.

W [v, d] ≈ Σ_b R_b M_bᵀ with rows R_b [v, r_b] and mixers M_b [d, r_b]. Directions are those of the singular value
decomposition in two metrics at once, how often a row is read (rows of the weight) and how much the model minds an error
there (G, the curvature at the table's output): it minimises Σ_v f_v (w̃_v − w_v)ᵀ G (w̃_v − w_v), the lookup's form of
the generalised low-rank problem (Hsu et al. 2022, arXiv 2207.00112, weigh rows alone).

A table's spectrum falls too slowly for one band to win: what is cut off costs more than what few bits would have. So a
second band, called the backbone, keeps the next directions in the coarser format of a pair ("int2-b32+int4-b32"), which
is transform coding: bits go by the variance of a direction (Cover & Thomas, §10.3, reverse water-filling).

Row-wise tensor trains (TensorGPT, Xu et al. 2023, arXiv 2307.00526) were turned down: they give every row a train of
its own, so nothing is shared between rows. Of all-MiniLM-L6-v2's table (493 rows, folded to 16 × 24) one at 52 % of the
parameters leaves 35.4 % of the squared norm, and 35.6 % of Gaussian noise; 8 × 6 × 8 at 60 % leaves 36.0 % and 35.8 %.
Unweighted low rank leaves 20.7 % at half of the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.contraction import Contraction, Gather, MatMul, Step, Sum
from edgec.decompose import Finish
from edgec.decompose._lapack import eigenpairs
from edgec.decompose._metric import solve
from edgec.errors import NumericsError, PlanError
from edgec.moments import SecondMoment, TableMoment
from edgec.records import Spec

PLUGIN = True
LOOKUP = True

Array = NDArray[Any]

_NAMES = (("rows", "mix"), ("backbone", "mix_backbone"))
"""Of every band its table and its mixer; the first band holds the directions that matter most. A layer's format may
store the core called "backbone" in fewer bits than the others."""

_FINE = (1 / 3, 1 / 2)
"""Shares of all columns that the finer band of two is given."""


def contraction(spec: Spec, out: int, in_: int) -> Contraction:
    """ranks (r,): Gather(rows [v, r]) → MatMul(mix [d, r]). ranks (r₁, r₂): the sum of two such branches.

    out: rows of the table v. in_: its width d, as for a dense table's shape.
    """
    if spec.modes or not 1 <= len(spec.ranks) <= len(_NAMES):
        raise PlanError(f"table_svd takes one rank or two and no modes; got {spec}")
    for cut, rank in enumerate(spec.ranks):
        top = min(out, in_) - sum(spec.ranks[:cut])
        if not 1 <= rank <= top:
            raise PlanError(f"rank {rank} of {spec} is outside 1 … {top}, the cut's maximum")
    branches: list[tuple[Step, ...]] = [
        (Gather(rows, out, rank), MatMul(mix, in_, rank))
        for (rows, mix), rank in zip(_NAMES, spec.ranks, strict=False)
    ]
    return Contraction(in_, out, branches[0] if len(branches) == 1 else (Sum(tuple(branches)),))


def factorize(weight: NDArray[Any], spec: Spec, moment: SecondMoment | None, finish: Finish) -> None:
    """weight [v, d] → the tables of all bands first, then every mixer, re-fitted to the tables as they became.

    moment: a `TableMoment`; without one, all rows and all directions count alike. Columns of the tables are scaled so
    that an error in any of them costs the same, which is why they are rounded to nearest.
    """
    v, d = weight.shape
    contraction(spec, v, d)
    analysis, read = _BASIS.get(weight, moment)
    width = np.float32 if weight.dtype == np.float32 else np.float64  # a large table is not copied at twice its size
    bands = np.cumsum((0, *spec.ranks))
    tables = []
    for (name, _), start, stop in zip(_NAMES, bands[:-1], bands[1:], strict=False):
        columns = np.asarray(weight @ analysis[:, start:stop].astype(width))
        tables.append(np.asarray(finish(name, columns, None), dtype=width))
    stacked = np.concatenate(tables, axis=1)
    weighted = stacked * read[:, None].astype(width)
    second = np.asarray(weighted.T @ stacked, dtype=np.float64)
    cross = np.asarray(weight.T @ weighted, dtype=np.float64)
    # One mixer after the other: each is fitted together with those still to come, to what the earlier ones became.
    for (_, name), start, stop in zip(_NAMES, bands[:-1], bands[1:], strict=False):
        mixers = solve(second[start:, start:], cross[:, start:])
        own = second[start:stop, start:stop]
        seen = np.asarray(finish(name, mixers[:, : stop - start], SecondMoment(own)), dtype=np.float64)
        cross = cross - seen @ second[start:stop]


class _Basis:
    """Remembers the directions of the last table: scoring tries one table at many ranks and formats. Keyed by identity,
    holding what it is keyed by.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._found: tuple[Array, Array] | None = None

    def get(self, weight: Array, moment: SecondMoment | None) -> tuple[Array, Array]:
        """Analysis [d, d], most important direction first, and how much each row counts [v]."""
        same = len(self._key) == 2 and self._key[0] is weight and self._key[1] is moment
        if not same or self._found is None:
            self._found, self._key = _directions(weight, moment), (weight, moment)
        return self._found


_BASIS = _Basis()


def _directions(weight: Array, moment: SecondMoment | None) -> tuple[Array, Array]:
    """R V, for G = R Rᵀ and V the eigenvectors of Rᵀ Wᵀ diag(f) W R: columns W R V have diagonal second moments, and
    errors in them cost alike.
    """
    v, d = weight.shape
    if not np.isfinite(weight).all():
        raise NumericsError("the table holds NaN or Inf")
    read = moment.rows if isinstance(moment, TableMoment) else np.full(v, 1 / v, np.float32)
    gram = np.asarray((weight * read[:, None]).T @ weight, dtype=np.float64)
    root = np.eye(d) if moment is None else moment.root
    _, vectors = eigenpairs(root.T @ gram @ root, lean=True)
    return root @ vectors[:, ::-1], read


def suggest(out: int, in_: int, ratio: float, multiple: int) -> Sequence[Spec]:
    """ratio × in_ columns: as one band where that saves parameters, and as two at each share of `_FINE`."""
    total = int(ratio * in_) // multiple * multiple
    specs = [Spec("table_svd", (total,))] if total >= multiple and total * (out + in_) < out * in_ else []
    for share in _FINE:
        fine = round(share * total / multiple) * multiple
        if multiple <= fine < total <= min(out, in_) and total - fine >= multiple:
            specs.append(Spec("table_svd", (fine, total - fine)))
    return list(dict.fromkeys(specs))


def exact(out: int, in_: int) -> Sequence[Spec]:
    """Full rank, in one band and, where there are two columns, in two."""
    full = min(out, in_)
    return [Spec("table_svd", (full,))] + ([Spec("table_svd", (full // 2, full - full // 2))] if full > 1 else [])
