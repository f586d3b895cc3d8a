"""Arrays in, cores and a contraction out. One file per decomposition; this room knows arrays, not models.

A file is a plugin when it sets `PLUGIN = True` and defines

    contraction(spec, out, in_) -> Contraction
        structure and costs, without any numbers; PlanError when the spec does not fit
    factorize(weight, spec, moment, finish) -> None
        weight [out, in] → every core through `finish`
    suggest(out, in_, ratio, multiple) -> list[Spec]
        specs with about ratio × out × in parameters, ranks multiples of `multiple`
    exact(out, in_) -> list[Spec]
        specs that lose nothing, at least one: what the contract tests hold every decomposition to

One that also sets `LOOKUP = True` is of tables: weight [v, d] (out, in_ = v, d), a contraction that takes row numbers
and starts with a Gather, and a moment that is a `TableMoment`.

A file may set `SEARCHED = False`: its kind works in a plan that names it, but is not offered to the planner by default,
because on the real weights measured so far another kind was always the better buy (its docstring says by how
much). Fitting what cannot win is what a profile would spend most of its time on. Absent means True.

`finish(name, core, moment)` stores a core [n, k] (quantised or not) and returns the values that the runtime will see,
so that the cores still to come are fitted to what the earlier ones became, not to what they were meant to be. A name
may be finished more than once, by forms that are fitted in turns: the last call stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from numpy.typing import NDArray

from edgec import plugins
from edgec.contraction import Contraction
from edgec.moments import SecondMoment
from edgec.records import Spec

Finish = Callable[[str, NDArray[Any], SecondMoment | None], NDArray[Any]]


class Decomposition(Protocol):
    """What a file in this folder defines at module level."""

    def contraction(self, spec: Spec, out: int, in_: int) -> Contraction: ...
    def factorize(self, weight: NDArray[Any], spec: Spec, moment: SecondMoment | None, finish: Finish) -> None: ...
    def suggest(self, out: int, in_: int, ratio: float, multiple: int) -> Sequence[Spec]: ...
    def exact(self, out: int, in_: int) -> Sequence[Spec]: ...


def kinds() -> tuple[str, ...]:
    """Names of all decompositions of matrices."""
    return tuple(name for name in plugins.names(__name__) if not _lookup(name))


def lookups() -> tuple[str, ...]:
    """Names of all decompositions of lookup tables; "dense", which every role has, is not among them."""
    return tuple(name for name in plugins.names(__name__) if _lookup(name))


def kinds_of(role: str) -> tuple[str, ...]:
    """What a layer of this role ("embedding" or any other) may be."""
    return ("dense", *lookups()) if role == "embedding" else kinds()


def _lookup(name: str) -> bool:
    return bool(getattr(plugins.load(__name__, name), "LOOKUP", False))


def searched() -> tuple[str, ...]:
    """Names of the decompositions of matrices that are offered to the planner by default."""
    return tuple(name for name in kinds() if getattr(plugins.load(__name__, name), "SEARCHED", True))


def get(kind: str) -> Decomposition:
    """The decomposition called `kind`; UsageError lists the known ones."""
    return cast(Decomposition, plugins.load(__name__, kind))
