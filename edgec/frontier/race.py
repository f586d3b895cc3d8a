"""Runs the contestants one after the other and compares each of edgec's plans with the best rival of its size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from edgec import peers
from edgec.compress.apply import fit_choices
from edgec.errors import BudgetError, NumericsError, PlanError, RuntimeUnavailableError
from edgec.evaluate.paired import Resampled
from edgec.fit import Factors
from edgec.frontier.judge import Judge, Measured
from edgec.frontier.planning import Planner, mixture
from edgec.modeling import Layer
from edgec.peers import Peer, Replacement
from edgec.pipeline import Progress
from edgec.plan.candidates import FALLBACK, executable
from edgec.plan.planner import make_choice
from edgec.profile.store import Profile
from edgec.quantize.formats import CoreFormat
from edgec.records import Choice, Spec, Target
from edgec.report.frontier_records import AHEAD, ALONE, BEHIND, NOISE, Point, Verdict
from edgec.workspace import Workspace

logger = logging.getLogger(__name__)

SLACK = 0.05
"""How much larger than edgec's plan a rival may be, as a share: formats come in few sizes, and a rival that is a little
larger is still the one that a user would take instead. It favours the rivals: at 2 bits it admits IQ2_XXS (2.06), at
2.5 Q2_K (2.625), at 3 IQ3_XXS (3.06), at 4 int4-b128 (4.125). A tenth was tried and turned down: on the steep part of
the curve it compares 4.0 bits with 4.4.
"""

Vectors = Mapping[str, NDArray[np.float32]]

Heal = Callable[[Mapping[str, Factors]], tuple[Mapping[str, Factors], Vectors]]
"""Factors of all layers → factors trained against the dense model and stored in the same formats, in a fixed time, and
the biases and norms that were trained with them."""

EDGEC = "edgec"


@dataclass(frozen=True, eq=False)
class _Entry:
    """A contestant with its metric's replicates; factors are kept for edgec's plans, peer for refitting a rival."""

    point: Point
    metric: Resampled
    factors: Mapping[str, Factors] | None = None
    peer: Peer | None = None
    healable: bool = False


class Race:
    """skipped: what was not run, with the reason."""

    def __init__(
        self, workspace: Workspace, target: Target, found: Profile, judge: Judge, progress: Progress
    ) -> None:
        self.workspace, self.target, self.found, self.judge, self.progress = workspace, target, found, judge, progress
        self.skipped: list[str] = []
        self._entries: list[_Entry] = []
        self._seen: dict[object, Measured] = {}  # types that fall back to one and the same are measured once
        self._linears = [layer for layer in workspace.layers if layer.role == "linear"]
        self._parameters = sum(layer.shape[0] * layer.shape[1] for layer in self._linears)
        if not self._linears:
            raise PlanError(f"{workspace.folder}: there is nothing to compare: the model has no block linears")
        self._beside = self._fitted(beside_linears(workspace.layers, target))

    @property
    def points(self) -> tuple[Point, ...]:
        return tuple(entry.point for entry in self._entries)

    def _fitted(self, choices: Sequence[Choice]) -> dict[str, Factors]:
        workspace, moment = self.workspace, self.found.statistics.moment
        return fit_choices(choices, workspace.weight, workspace.layers, moment, workspace.cache)

    def edgec(self, planner: Planner, budgets: Mapping[float, str]) -> None:
        """One contestant per budget that the model has a plan for."""
        for bits, text in budgets.items():
            try:
                planned = planner(text)
            except BudgetError as error:
                self.skipped.append(f"{EDGEC} at {bits:g} bits: {error}")
                continue
            point = self._point(
                f"{EDGEC} {bits:g}", EDGEC, planned.form, planned.linear_bytes, self.target.name, budget=bits
            )
            self._measure(point, planned.factors, keep=True, healable=True)

    def peers(self, names: Sequence[str], bits: Sequence[float]) -> None:
        """Every contestant of the named methods; what a method cannot do here is skipped and said."""
        contestants: list[Peer] = []
        for name in names:
            family = peers.get(name)
            try:
                contestants += family.peers(self.target, bits)
            except RuntimeUnavailableError as error:
                self.skipped.append(f"{family.FAMILY}: {error}")
        for done, peer in enumerate(contestants):
            self.progress("peers", done, len(contestants))
            self._run(peer)
        self.progress("peers", len(contestants), len(contestants))

    def _run(self, peer: Peer) -> None:
        try:
            made = self._replaced(peer)
        except (PlanError, NumericsError, RuntimeUnavailableError) as error:
            self.skipped.append(f"{peer.name}: {error}")
            return
        forms = mixture(r.form for r in made.values())
        size = sum(r.bytes for r in made.values())
        simulated = any(r.simulated for r in made.values())
        point = self._point(
            peer.name, peer.family, forms, size, peer.runtime, budget=peer.bits, simulated=simulated
        )
        shown = {(p.family, p.form, p.linear_bytes) for p in self.points}
        if (peer.family, forms, size) in shown:
            return  # every layer was narrower than the block: the same numbers as a row that is there
        healable = not simulated and all(r.healable for r in made.values())
        stored = (peer.family, size, *(r.form.rpartition("→")[2] for r in made.values()))
        factors = {name: r.factors for name, r in made.items()}
        self._measure(point, factors, peer=peer, healable=healable, stored=stored)

    def _replaced(self, peer: Peer) -> dict[str, Replacement]:
        made = {}
        for layer in self._linears:
            moment = self.found.statistics.moment(layer.name)
            try:
                made[layer.name] = peer.replace(self.workspace.weight(layer.name), moment)
            except (PlanError, NumericsError, RuntimeUnavailableError) as error:
                raise type(error)(f"layer {layer.name!r}: {error}") from error
        return made

    def _point(
        self,
        name: str,
        family: str,
        form: str,
        size: int,
        runtime: str,
        *,
        budget: float | None,
        simulated: bool = False,
        healed: bool = False,
    ) -> Point:
        bpw = 8 * size / self._parameters
        return Point(name, family, form, budget, bpw, size, runtime, simulated, healed)

    def _measure(
        self,
        point: Point,
        factors: Mapping[str, Factors],
        *,
        keep: bool = False,
        peer: Peer | None = None,
        healable: bool = False,
        vectors: Vectors = MappingProxyType({}),
        stored: object = None,
    ) -> None:
        """stored: what tells these numbers from others; those that were measured are not measured again."""
        measured = self._seen.get(stored) or self.judge.measure({**self._beside, **factors}, vectors)
        if stored is not None:
            self._seen[stored] = measured
        figures, metric = measured
        logger.info("%s: %.3f linear bpw, %s %.4g", point.name, point.linear_bpw, self.judge.metric, metric.value)
        shown = replace(point, figures=figures)
        self._entries.append(_Entry(shown, metric, factors if keep else None, peer, healable))

    def heal(self, healer: Heal) -> None:
        """edgec's plans and, at each budget, the best dense and the best factored rival, all with the same healer."""
        plans = [e for e in self._entries if e.point.family == EDGEC]
        chosen: list[_Entry] = list(plans)
        for plan in plans:
            pool = [e for e in self._pool(plan) if e.healable and e.peer is not None]
            for factored in (False, True):
                group = [e for e in pool if e.peer is not None and e.peer.factored == factored]
                if group and (best := _best(group)) not in chosen:
                    chosen.append(best)
        for done, entry in enumerate(chosen):
            self.progress("healing", done, len(chosen))
            self._heal(entry, healer)
        self.progress("healing", len(chosen), len(chosen))

    def _heal(self, entry: _Entry, healer: Heal) -> None:
        factors = entry.factors
        if factors is None:
            assert entry.peer is not None
            factors = {name: made.factors for name, made in self._replaced(entry.peer).items()}
        healed, vectors = healer({**self._beside, **factors})
        size = sum(healed[layer.name].stored_bytes for layer in self._linears)
        old = entry.point
        point = self._point(
            f"{old.name}, healed", old.family, old.form, size, old.runtime, budget=old.budget, healed=True
        )
        self._measure(point, healed, vectors=vectors)

    def verdicts(self) -> tuple[Verdict, ...]:
        """Every plan of edgec's; a plan that was not healed is compared with peers that were not."""
        return tuple(self._verdict(entry) for entry in self._entries if entry.point.family == EDGEC)

    def _verdict(self, plan: _Entry) -> Verdict:
        point, pool = plan.point, self._pool(plan)
        assert point.budget is not None
        if not pool:
            return Verdict(point.budget, point.name, point.linear_bpw, None, None, None, None, None, ALONE)
        rival = _best(pool)
        against = (rival.point.name, rival.point.linear_bpw)
        if not plan.metric.finite:
            return Verdict(point.budget, point.name, point.linear_bpw, *against, None, None, None, BEHIND)
        difference = plan.metric - rival.metric
        low, high = difference.interval()
        verdict = AHEAD if high < 0 else BEHIND if low > 0 else NOISE
        return Verdict(point.budget, point.name, point.linear_bpw, *against, difference.value, low, high, verdict)

    def _pool(self, plan: _Entry) -> list[_Entry]:
        """Rivals of its size that something executes."""
        room = (1 + SLACK) * plan.point.linear_bytes
        return [
            e
            for e in self._entries
            if e.point.family != EDGEC
            and not e.point.simulated
            and e.point.linear_bytes <= room
            and e.metric.finite
            and (plan.point.healed or not e.point.healed)
        ]


def _best(entries: Iterable[_Entry]) -> _Entry:
    return min(entries, key=lambda entry: (entry.metric.value, entry.point.linear_bytes))


def beside_linears(layers: Sequence[Layer], target: Target) -> list[Choice]:
    """Tables and head at the target's first 8-bit format that fits, as a budget on linears keeps them; else fp16."""
    formats: dict[str, CoreFormat] = {}
    choices = []
    for layer in layers:
        if layer.role == "linear":
            continue
        table = layer.role == "embedding" or layer.tied_to is not None
        offered = [CoreFormat.parse(f) for f in (target.embedding_formats if table else target.dense_formats)]
        fits = [
            f
            for f in offered
            if f.bits == 8 and executable(target, layer.role, layer.shape, Spec("dense"), f, tied=table)
        ]
        formats[layer.name] = formats.get(layer.tied_to or "", fits[0] if fits else FALLBACK)
        choices.append(make_choice(layer, Spec("dense"), formats[layer.name]))
    return choices
