"""Greedy refinement: whole plans are measured, and what they teach corrects the losses that the next plans are made of.

From the plan that predicted losses allocate (and the uniform rivals), every batch (1) learns correction factors from
all plans measured so far (`corrections.py`), (2) allocates with the corrected losses, and with them tilted by one
group at a time, which moves bytes from the layers of that group to where they are worth most, or back, and (3)
measures those plans end to end and keeps the best. It stops when a batch does not help. Random swaps of layers were
turned down: a swap changes the measured loss by less than a percent, so that hundreds would be needed where a dozen
tilts of groups suffice.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from edgec.errors import PlanError, UsageError
from edgec.plan.corrections import Corrections, Groups, learn
from edgec.plan.offer import Loss, Offer
from edgec.records import Choice

logger = logging.getLogger(__name__)

Evaluate = Callable[[list[Choice]], float]
"""Measured end-to-end loss of the choices applied to the model, on text that did not calibrate."""

Progress = Callable[[int, int, float], None]
"""(how much of the search is over, all of it, both in plans; least loss so far)."""

METHODS = ("greedy", "none", "anneal")

_ANNEALING_S = 600.0
"""What `anneal` may take when no time is named, its refinement included [seconds]."""
_UNLIMITED = 10_000
"""Evaluations of a search that is limited by its time."""
_TILT = math.log(1.5)
_BATCH = 5
_STAY = math.log(0.95)
"""A layer's present choice is taken for 5 % better than predicted: a move for less is noise, and a new fit costs."""
_GAIN = 1e-3
"""A batch that lowers the loss by less than this share did not help."""


@dataclass(frozen=True)
class Search:
    """How much measuring a plan is worth.

    method: "none" (the allocated plan against the uniform ones), "greedy" (refined), "anneal" (refined, then
    simulated annealing). evaluations: plans measured by each of the two, rivals included. seconds: no further plan is
    begun after so long; such a run depends on the machine's speed. seed: of the annealing.
    """

    method: str = "greedy"
    evaluations: int = 24
    seconds: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"search {self.method!r}: expected one of {', '.join(METHODS)}")
        if self.evaluations < 1:
            raise UsageError(f"search: {self.evaluations} evaluations; at least 1 plan has to be measured")
        if self.seconds is not None and not self.seconds > 0:
            raise UsageError(f"search: a time limit of {self.seconds} seconds; expected a positive number")

    def share(self, plans: int, seconds: float) -> float:
        """How much of the search is over after so many plans and seconds, 0 … 1."""
        late = 0.0 if self.seconds is None else seconds / self.seconds
        return min(1.0, max(plans / self.evaluations, late))


def parse_search(text: str, seed: int = 0) -> Search:
    """"none", "greedy", "anneal" or "anneal:10min" (also s). Raises UsageError."""
    method, _, limit = text.partition(":")
    if not limit:
        return Search(method, seconds=_ANNEALING_S if method == "anneal" else None, seed=seed)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(min|s)", limit)
    if not match:
        raise UsageError(f"--search {text}: expected a time after the colon, such as anneal:10min or anneal:90s")
    seconds = float(match[1]) * (60 if match[2] == "min" else 1)
    return Search(method, evaluations=_UNLIMITED if method == "anneal" else 24, seconds=seconds, seed=seed)


Key = frozenset[tuple[str, object, str]]


def key_of(choices: Iterable[Choice]) -> Key:
    """What a plan computes: two plans of one key measure the same."""
    return frozenset((c.layer, c.spec, c.format) for c in choices)


@dataclass
class Ledger:
    """Every plan that was measured, each once. penalty: what is added to the measured loss to compare plans (0, or
    what their milliseconds are worth).
    """

    evaluate: Evaluate
    penalty: Callable[[Sequence[Choice]], float] = lambda choices: 0.0
    clock: Callable[[], float] = time.monotonic
    records: list[tuple[list[Choice], float]] = field(default_factory=list)
    _known: dict[Key, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def measure(self, choices: list[Choice]) -> float:
        """Loss and penalty of a plan; infinite where the model gives NaN."""
        key = key_of(choices)
        if key not in self._known:
            loss = self.evaluate(choices)
            self._known[key] = math.inf if math.isnan(loss) else loss
            self.records.append((choices, self._known[key]))
        return self._known[key] + self.penalty(choices)

    def knows(self, choices: Iterable[Choice]) -> bool:
        return key_of(choices) in self._known

    @property
    def count(self) -> int:
        """Plans measured."""
        return len(self.records)

    @property
    def seconds(self) -> float:
        return self.clock() - self.started


@dataclass(frozen=True)
class Found:
    """A plan and what was measured: of itself, of the best plan before the search, of every named rival."""

    name: str
    choices: list[Choice]
    loss: float
    before: float
    named: dict[str, float]
    evaluations: int
    seconds: float


def refine(
    offer: Offer,
    starts: Sequence[tuple[str, list[Choice]]],
    ledger: Ledger,
    search: Search,
    progress: Progress | None = None,
    *,
    goal: float = -math.inf,
) -> Found:
    """The best plan measured. starts: named plans; all are measured, whatever the limits. goal: a loss that is good
    enough to stop at. Raises PlanError when no plan has a finite loss.
    """
    run = _Run(offer, ledger, search, progress, goal)
    named = {name: run.try_plan(name, choices) for name, choices in starts}
    before = run.best
    if not before < math.inf:
        raise PlanError("no plan gives a finite loss; the model or its calibration text is broken")
    if search.method != "none":
        run.probe()
        while run.batch():
            pass
    logger.info("search: %d plans in %.1f s, %.4g to %.4g", run.used, ledger.seconds, before, run.best)
    return Found(run.name, run.plan, run.best, before, named, run.used, ledger.seconds)


class _Run:
    def __init__(self, offer: Offer, ledger: Ledger, search: Search, progress: Progress | None, goal: float) -> None:
        self.goal = goal
        self.offer, self.ledger, self.search, self.progress = offer, ledger, search, progress
        self.groups = Groups.of_layers(list(offer.choices))
        self.name, self.plan, self.best = "", [], math.inf
        self.first, self.begun = ledger.count, ledger.seconds

    plan: list[Choice]

    @property
    def used(self) -> int:
        return self.ledger.count - self.first

    @property
    def spent(self) -> bool:
        return self.share >= 1 or self.best <= self.goal

    @property
    def share(self) -> float:
        return self.search.share(self.used, self.ledger.seconds - self.begun)

    def try_plan(self, name: str, choices: list[Choice]) -> float:
        loss = self.ledger.measure(choices)
        logger.debug("search: %s %.5g", name, loss)
        if loss < self.best and self.offer.fits(choices):
            self.name, self.plan, self.best = name, choices, loss
        if self.progress:
            self.progress(round(self.share * self.search.evaluations), self.search.evaluations, self.best)
        return loss

    def probe(self) -> None:
        """What each group of the best plan costs within that plan: the loss with that group's layers at their most
        faithful, over budget as that is. The factors of forms, depths and matrices are told apart by these.
        """
        plan, most = self.plan, self.used + max(1, (self.search.evaluations - self.used) // 3)
        for group, share in Corrections(self.groups).shares(plan).items():
            if self.spent or self.used >= most:
                return
            if 0.05 < share < 0.95:
                restored = [self.offer.best(c.layer) if group in self.groups.of(c) else c for c in plan]
                if not self.ledger.knows(restored):
                    self.ledger.measure(restored)

    def batch(self) -> bool:
        """Measure one batch of proposals; did it help, and may there be another?"""
        before, tried = self.best, 0
        for name, proposal in self._proposals():
            if self.spent or tried == _BATCH:
                break
            tried += 1
            self.try_plan(name, proposal)
        return not self.spent and tried > 0 and self.best < before * (1 - _GAIN)

    def _proposals(self) -> Iterable[tuple[str, list[Choice]]]:
        """New plans, the most promising first: corrected, then tilted by the groups that cost most."""
        learned = learn(self.groups, self.ledger.records)
        home = key_of(self.plan)

        def stay(corrections: Corrections) -> Loss:
            def loss(choice: Choice) -> float:
                here = (choice.layer, choice.spec, choice.format) in home
                return corrections(choice) * (math.exp(_STAY) if here else 1.0)

            return loss

        variants = [learned]
        for group in learned.shares(self.plan):
            variants += [learned.tilted(group, _TILT), learned.tilted(group, -_TILT)]
        offered = set()
        for variant in variants:
            proposal = self.offer.allocate(stay(variant))
            key = key_of(proposal)
            if key not in offered and not self.ledger.knows(proposal):
                offered.add(key)
                yield "refined", proposal
