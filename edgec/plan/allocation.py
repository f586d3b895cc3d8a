"""Spend a budget over the layers: Lagrangian allocation on predicted losses, then a choice between whole plans by
measurement.

Predicted losses add up (K-FAC, see `profile/activations.py`), so the best plan under a byte budget takes from
every layer's lower convex hull the point where one more byte buys the same everywhere; walking all hulls by
steepest descent first is that allocation.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from edgec.errors import BudgetError, PlanError
from edgec.records import Choice


@dataclass(frozen=True)
class Option:
    """One way to treat one item: a layer, or a head and embedding that share a table."""

    choices: tuple[Choice, ...]

    @property
    def bytes(self) -> int:
        return sum(c.bytes for c in self.choices)

    @property
    def loss(self) -> float:
        return sum(c.loss if c.loss is not None else (c.error or 0.0) ** 2 for c in self.choices)


def layer_items(candidates: Sequence[Sequence[Choice]], tied: Sequence[tuple[str, str]] = ()) -> list[list[Option]]:
    """One item per layer; tied (head, embedding) pairs become one item whose shared table is paid for once."""
    by_name = {choices[0].layer: choices for choices in candidates if choices}
    items = []
    for head, embedding in tied:
        heads, tables = by_name.pop(head), by_name.pop(embedding)
        items.append(_tied_options(heads, tables))
    items += [[Option((c,)) for c in choices] for choices in by_name.values()]
    return items


def _tied_options(heads: Sequence[Choice], tables: Sequence[Choice]) -> list[Option]:
    shared = {c.format: c for c in tables if c.spec.kind == "dense"}  # a factored table has no rows to multiply with
    options = []
    for head in heads:
        if head.spec.kind == "dense":
            if head.format in shared:
                options.append(Option((replace(head, bytes=0), shared[head.format])))
        else:
            options += [Option((head, table)) for table in tables]
    return options


def hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull of (bytes, loss), cheapest first: only these can be optimal for any price of a byte."""
    ordered = sorted(options, key=lambda o: (o.bytes, o.loss))
    kept: list[Option] = []
    for option in ordered:
        if kept and option.loss >= kept[-1].loss:
            continue
        while len(kept) >= 2 and _slope(kept[-2], option) <= _slope(kept[-2], kept[-1]):
            kept.pop()
        kept.append(option)
    return kept


def _slope(a: Option, b: Option) -> float:
    return (b.loss - a.loss) / max(1, b.bytes - a.bytes)


def allocate(items: Sequence[Sequence[Option]], budget_bytes: float) -> list[Choice]:
    """The choices of one option per item whose bytes stay within the budget. Raises BudgetError naming the floor."""
    if not items:
        raise PlanError("there is nothing to plan: the model has no layer that can be replaced")
    hulls = [hull(options) for options in items]
    spent = sum(h[0].bytes for h in hulls)
    if spent > budget_bytes:
        raise BudgetError(
            f"needs at least {_mb(spent)} (every layer at its smallest), the budget leaves {_mb(budget_bytes)}"
        )
    position = [0] * len(hulls)
    queue = [(_slope(h[0], h[1]), i) for i, h in enumerate(hulls) if len(h) > 1]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        here, there = hulls[i][position[i]], hulls[i][position[i] + 1]
        if spent + there.bytes - here.bytes > budget_bytes:
            continue  # too dear for what is left; a cheaper step of another layer may still fit
        spent += there.bytes - here.bytes
        position[i] += 1
        if position[i] + 1 < len(hulls[i]):
            heapq.heappush(queue, (_slope(there, hulls[i][position[i] + 1]), i))
    chosen = [h[p] for h, p in zip(hulls, position, strict=True)]
    return [choice for option in _fill(items, chosen, budget_bytes - spent) for choice in option.choices]


def _fill(items: Sequence[Sequence[Option]], chosen: list[Option], left: float) -> list[Option]:
    """Spend what the hulls left over: the best single swap that fits, again and again, off the hull as well."""
    chosen = list(chosen)
    while True:
        best: tuple[float, int, Option] | None = None
        for i, options in enumerate(items):
            for option in options:
                gain = chosen[i].loss - option.loss
                if gain > 0 and option.bytes - chosen[i].bytes <= left and (best is None or gain > best[0]):
                    best = (gain, i, option)
        if best is None:
            return chosen
        _, i, option = best
        left -= option.bytes - chosen[i].bytes
        chosen[i] = option


def pick(
    plans: Sequence[tuple[str, list[Choice]]], evaluate: Callable[[list[Choice]], float]
) -> tuple[str, list[Choice], dict[str, float]]:
    """The plan with the least measured loss: (name, choices, all losses). Ties go to the earlier; NaN never wins."""
    measured = {name: evaluate(choices) for name, choices in plans}
    best_name, best = min(plans, key=lambda plan: measured[plan[0]] if not math.isnan(measured[plan[0]]) else math.inf)
    if not measured[best_name] < math.inf:
        raise PlanError("no plan gives a finite loss; the model or its calibration text is broken")
    return best_name, best, measured


def _mb(count: float) -> str:
    return f"{count / 1e6:.2f} MB"
