"""`--max-loss 1%`: the smallest plan whose measured loss stays at or below a line.

Bisection over the bytes, every budget spent by the corrected losses of all plans measured so far, so that layers are
compressed in the order in which it costs least; then refinement at ever smaller budgets, as long as the measuring
lasts. Predicted losses alone were turned down: they are off by a third either way, and a line is a promise.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

from edgec.errors import PlanError, UsageError
from edgec.plan.budget import Budget
from edgec.plan.corrections import Groups, learn, predicted
from edgec.plan.latency import Pace
from edgec.plan.offer import Loss, Offer, Sizes
from edgec.plan.planner import Profiled, plan_of
from edgec.plan.refine import Evaluate, Ledger, Progress, Search, refine
from edgec.records import Choice, Plan, Target

logger = logging.getLogger(__name__)

_CLOSE = 1.01
"""Bisection stops when the smallest budget that is good enough is within 1 % of one that is not."""
_STEP = 0.98
"""Share of the bytes that the next refinement is given."""


@dataclass(frozen=True)
class Line:
    """The largest measured loss that is accepted: 1 − mean cosine, or relative increase of perplexity."""

    value: float
    text: str

    def __str__(self) -> str:
        return f"max-loss {self.text}"


def parse_max_loss(text: str) -> Line:
    """"1%" or "0.01". Raises UsageError."""
    stripped = text.strip()
    number, percent, rest = stripped.partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = math.nan
    if rest or not 0 < value < 1:
        raise UsageError(f"max loss {text!r}: expected a share above 0 and below 1, such as 1% or 0.01")
    return Line(value, stripped)


def plan_to_loss(
    profile: Profiled,
    target: Target,
    line: Line,
    sizes: Sizes,
    measure: Evaluate,
    search: Search | None = None,
    *,
    linear: bool = False,
    pace: Pace | None = None,
    progress: Progress | None = None,
) -> Plan:
    """The smallest plan found whose measured loss is at or below the line.

    measure: the loss that the line is about. linear: compress the block linears only, everything else at int8. At most
    `search.evaluations` plans are measured (and the largest one). Raises PlanError when even the largest plan is
    above the line.
    """
    search = search or Search()
    budget = Budget("linear" if linear else "total", math.inf, str(line))
    offer = Offer.of(profile.layers, target, budget, sizes, pace)
    ledger = Ledger(measure)
    largest = offer.allocate()
    loss = ledger.measure(largest)
    if not loss <= line.value:
        raise PlanError(
            f"{line}: even the largest plan that {target.name} executes loses {loss:.3g}; raise the line or choose "
            "another target"
        )
    run = _Descent(offer, ledger, line, search, progress)
    run.take(largest, loss)
    run.bisect()
    if search.method != "none":
        run.refine()
    bits = 8 * (offer.limited_bytes(run.best) + (0 if linear else sizes.other_bytes)) / offer.limited_parameters
    note = (
        f"{line}: {ledger.count} plans measured; the smallest that holds the line loses {run.loss:.3g} at "
        f"{bits:.2f}bpw{'-linear' if linear else ''}"
    )
    return plan_of(profile, target, str(line), sizes, run.best, [note])


class _Descent:
    def __init__(self, offer: Offer, ledger: Ledger, line: Line, search: Search, progress: Progress | None) -> None:
        self.offer, self.ledger, self.line, self.search, self.progress = offer, ledger, line, search, progress
        self.best: list[Choice] = []
        self.loss = math.inf
        self.bytes: float = math.inf

    @property
    def left(self) -> int:
        """Plans that may still be measured."""
        late = self.search.seconds is not None and self.ledger.seconds >= self.search.seconds
        return 0 if late else self.search.evaluations - self.ledger.count

    def take(self, choices: list[Choice], loss: float) -> bool:
        """Keep a plan if it holds the line with fewer bytes; does it hold it?"""
        size = self.offer.limited_bytes(choices)
        if loss <= self.line.value and size < self.bytes:
            self.best, self.loss, self.bytes = choices, loss, size
        if self.progress:
            self.progress(self.ledger.count, self.search.evaluations, loss)
        return loss <= self.line.value

    def bisect(self) -> None:
        groups = Groups.of_layers(list(self.offer.choices))
        low, high = float(self.offer.floor), self.bytes
        smallest = self._allocated(low) if self.left > 0 else None  # even that may do
        if smallest is not None and self.take(smallest, self.ledger.measure(smallest)):
            return
        while self.left > 0 and high > low * _CLOSE:
            middle = math.sqrt(low * high)
            plan = self._allocated(middle, learn(groups, self.ledger.records))
            if plan is not None and self.take(plan, self.ledger.measure(plan)):
                high = min(self.bytes, middle)
            else:
                low = middle
        logger.info("%s: bisection found %.0f bytes with %d plans", self.line, self.bytes, self.ledger.count)

    def refine(self) -> None:
        """The next smaller budget, refined until its plan holds the line, as long as that works."""
        groups = Groups.of_layers(list(self.offer.choices))
        while self.left > 0 and self.bytes * _STEP >= self.offer.floor:
            size = self.bytes * _STEP
            corrected = self._allocated(size, learn(groups, self.ledger.records))
            allocated = self._allocated(size)
            if corrected is None or allocated is None:
                return
            starts = [("corrected", corrected), ("allocated", allocated)]
            left = replace(self.search, evaluations=self.left, seconds=self._seconds_left())
            found = refine(self.offer.at(size), starts, self.ledger, left, goal=self.line.value)
            if not self.take(found.choices, found.loss):
                return

    def _allocated(self, size: float, loss: Loss = predicted) -> list[Choice] | None:
        """The plan that is predicted to be best at a size; None where none so small meets the cap of time."""
        try:
            return self.offer.at(size).allocate(loss)
        except PlanError as error:
            logger.info("%s: no plan of %.0f bytes (%s)", self.line, size, error)
            return None

    def _seconds_left(self) -> float | None:
        limit = self.search.seconds
        return None if limit is None else max(1e-3, limit - self.ledger.seconds)
