"""The decision, node by node: (1) is the functional error acceptable, (2) quantise by hardware, (3) place the KV cache,
(4) hold memory and time against the budget, and say which is the better buy.

Every node is a record with the numbers that it used, so that the answer can be argued with. The alternatives (nothing,
quantization only, the full pipeline, a smaller dense model) are judged by the same rules, and the simplest one that
keeps every limit wins: factoring has to earn its place. Ranking by a weighted score of size, time and quality was
turned down: nobody can say what the weights should be, and limits are what people have.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from edgec.errors import BudgetError, PlanError
from edgec.modeling import Layer
from edgec.plan import kv_cache
from edgec.plan.budget import parse_budget
from edgec.plan.candidates import executable
from edgec.plan.costs import Costs, Facts, Ram, milliseconds_of, ram_of
from edgec.plan.hardware import Hardware
from edgec.plan.planner import Evaluate, Profiled, Sizes, constrained_plan, plan_to_budget
from edgec.quantize.formats import CoreFormat, LayerFormat
from edgec.records import Choice, LayerProfile, Plan, Target

LEVELS = (8.5, 5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5)
"""Linear bpw at which node 1 asks what each layer prefers; embeddings at int8, as everywhere for figures on linears."""

BEST_HEALING = 0.9
"""Largest share of a loss that healing has been seen to recover (all-MiniLM-L6-v2 at half its parameters); the sources
claim 0.6 to 0.8. A loss that even this leaves above the line is not worth healing."""

NOTHING, QUANTIZATION, PIPELINE, SMALLER = "nothing", "quantization only", "full pipeline", "smaller model"
DEPLOY, GO_BACK, BUY_SMALLER = "deploy", "go back", "buy smaller"

_STEPS = 10
"""Budgets tried between the floor and what memory leaves."""


@dataclass(frozen=True)
class Limits:
    """ram: of the whole process [bytes]. latency_ms: of one token (causal LM) or one sentence (encoder), or None.
    loss: the acceptance line, in the planner's unit (nats per token, or 1 − cosine). loss_text: as it was asked for.
    """

    ram: float
    latency_ms: float | None
    loss: float
    loss_text: str


@dataclass(frozen=True)
class Level:
    """Node 1 at one budget. bpw: asked for; None in the other fields where even the smallest forms need more. kinds:
    how many block linears prefer each kind ("dense" is plain quantization). error: mean relative functional error of
    the linears. loss: predicted, of the whole model.
    """

    bpw: float
    reached: float | None = None
    kinds: Mapping[str, int] | None = None
    error: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class FunctionalNode:
    """levels: from most to fewest bits. incompressible: linears whose spectrum is that of a random matrix. acceptable:
    the fewest linear bpw whose predicted loss is within the line, or None.
    """

    linears: int
    incompressible: int
    levels: tuple[Level, ...]
    acceptable: float | None


@dataclass(frozen=True)
class QuantizationNode:
    """The target's class of hardware with its sources, and what the target offers of it."""

    hardware: Hardware
    dense: tuple[str, ...]
    factored: tuple[str, ...]


@dataclass(frozen=True)
class CacheNode:
    """decision: None for an encoder, which has no KV cache. note: what else the reader should know."""

    decision: kv_cache.CacheDecision | None
    note: str


@dataclass(frozen=True)
class Alternative:
    """One thing to buy. what: one of the four kinds. bytes: model file. ms: None where nothing was measured on the
    target's class. loss: None where unknown. The three *_from fields: "measured", "predicted", "estimate" or "exact".
    """

    name: str
    what: str
    bytes: float
    ram: Ram
    ms: float | None
    loss: float | None
    ram_from: str
    ms_from: str
    loss_from: str
    fits_ram: bool
    fits_latency: bool | None
    acceptable: bool | None
    factored: int = 0
    note: str = ""

    @property
    def viable(self) -> bool:
        """Keeps every limit that could be judged."""
        return self.fits_ram and self.fits_latency is not False and self.acceptable is True


@dataclass(frozen=True)
class BudgetNode:
    """weights_left: bytes for weights after runtime, cache and activations. int8_parameters: how large a dense model
    that holds at int8 [count].
    """

    limits: Limits
    weights_left: float
    int8_parameters: int
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True)
class Verdict:
    """decision: deploy, go back or buy smaller. sentence: the answer. numbers: what it rests on, in order."""

    decision: str
    sentence: str
    numbers: tuple[str, ...]


@dataclass(frozen=True)
class Advice:
    """The four nodes and the verdict. unit: of every loss."""

    facts: Facts
    target: str
    costs: Costs
    unit: str
    functional: FunctionalNode
    quantization: QuantizationNode
    cache: CacheNode
    budget: BudgetNode
    verdict: Verdict


@dataclass(frozen=True)
class Trimmed:
    """A profile with fewer candidates, for the planner."""

    fingerprint: str
    layers: Sequence[LayerProfile]


def functional_node(profile: Profiled, target: Target, sizes: Sizes, line: float) -> FunctionalNode:
    """What every layer prefers at every level of bits, and how far the model may go."""
    linears = [p for p in profile.layers if p.role == "linear"]
    levels = []
    for bpw in LEVELS:
        try:
            plan = plan_to_budget(profile, target, parse_budget(f"{bpw:g}bpw-linear"), sizes)
        except BudgetError:
            levels.append(Level(bpw))
            continue
        chosen = [c for c in plan.choices if c.role == "linear"]
        errors = [c.error for c in chosen if c.error is not None]
        levels.append(
            Level(
                bpw,
                plan.linear_bpw(),
                dict(Counter(c.spec.kind for c in chosen).most_common()),
                sum(errors) / len(errors) if errors else None,
                predicted_loss(plan.choices),
            )
        )
    within = [level.bpw for level in levels if level.loss is not None and level.loss <= line]
    return FunctionalNode(
        len(linears), sum(p.incompressible for p in linears), tuple(levels), min(within, default=None)
    )


def predicted_loss(choices: Iterable[Choice]) -> float | None:
    """Sum of what each choice adds alone; None where one was never scored (floats excepted, which add nothing)."""
    total = 0.0
    for choice in choices:
        if choice.loss is not None:
            total += choice.loss
        elif LayerFormat.parse(choice.format).quantised or choice.spec.kind != "dense":
            return None
    return total


def cache_node(
    facts: Facts, kv: tuple[str, ...], source: str, memory: kv_cache.Memory, relevance_signal: bool
) -> CacheNode:
    """kv: types that the runtime can keep, best first; source: who says so. memory: what is left for the cache, with
    the weights at their smallest.
    """
    if facts.cache is None:
        return CacheNode(None, "an encoder reads its whole input at once and keeps nothing: no KV cache")
    precisions = tuple(dict.fromkeys((kv[0], "fp16", "int8")))
    decision = kv_cache.decide(
        facts.cache,
        facts.context,
        facts.batch,
        memory,
        precisions=precisions,
        runs=kv,
        relevance_signal=relevance_signal,
    )
    if memory.host or memory.pooled:
        source += (
            "; a cache outside device memory is arithmetic only: the runtimes that edgec writes for do not move one, "
            "so the memory below counts it whole"
        )
    return CacheNode(decision, source)


class Desk:
    """Judges plans by one set of limits. evaluate: measured loss of choices, or None for predicted ones."""

    def __init__(
        self,
        profile: Profiled,
        layers: Sequence[Layer],
        target: Target,
        facts: Facts,
        costs: Costs,
        limits: Limits,
        kv: float,
        evaluate: Evaluate | None = None,
    ) -> None:
        self.profile, self.layers, self.target = profile, layers, target
        self.facts, self.costs, self.limits, self.kv, self.evaluate = facts, costs, limits, kv, evaluate
        self.sizes = Sizes(facts.parameters, facts.other_bytes)
        self.scored = {(c.layer, c.spec, c.format): c for p in profile.layers for c in p.candidates}

    @property
    def weights_left(self) -> float:
        fixed = self.costs.empty_bytes + self.costs.session_bytes + self.kv + self.facts.activation_bytes()
        return max(0.0, self.limits.ram - fixed)

    def uniform(self, fmt: str) -> Alternative:
        """The whole model dense in one format. Raises PlanError where the target has none of it."""
        plan = constrained_plan(
            f"dense:{fmt}", self.layers, self.target, self.profile.fingerprint, self.facts.other_bytes
        )
        choices = tuple(
            replace(c, loss=known.loss, error=known.error)
            if (known := self.scored.get((c.layer, c.spec, c.format)))
            else c
            for c in plan.choices
        )
        floats = not CoreFormat.parse(fmt).quantised
        onnx = self.target.artifact == "onnx"
        note = "half the file, not half the memory: the CPU computes in fp32" if onnx and fmt == "fp16" else ""
        return self.judge(
            replace(plan, choices=choices), f"dense {fmt}", NOTHING if floats else QUANTIZATION, floats, note
        )

    def searched(self, name: str, what: str, profile: Profiled) -> Alternative | None:
        """The plan with the least predicted loss that fits memory and time; the smallest one where none does; None
        where the target can do nothing with the model.
        """
        plans = list(self.plans(profile))
        if not plans:
            return None
        judged = [(self.judge(plan, name, what, measure=False), plan) for plan in plans]
        fitting = [pair for pair in judged if pair[0].fits_ram and pair[0].fits_latency is not False]
        best = min(fitting, key=lambda pair: pair[0].loss if pair[0].loss is not None else math.inf, default=judged[-1])
        return self.judge(best[1], name, what)

    def least_ram(self, profile: Profiled) -> float | None:
        """The least memory in which a predicted loss is within the line [bytes]; None where no plan's is."""
        judged = [self.judge(plan, "", PIPELINE, measure=False) for plan in self.plans(profile, capped=False)]
        return min((a.ram.total for a in judged if a.acceptable and a.fits_latency is not False), default=None)

    def plans(self, profile: Profiled, *, capped: bool = True) -> Iterable[Plan]:
        """Plans at budgets from the most that is any use (capped: that memory leaves) down to the floor."""
        low = high = float(self.facts.other_bytes)
        for layer in profile.layers:
            tied = layer.tied_to is not None
            sizes = [
                c.bytes
                for c in layer.candidates
                if executable(self.target, c.role, c.shape, c.spec, LayerFormat.parse(c.format), tied=tied)
            ]
            low += 0 if tied else min(sizes, default=0)
            high += max(sizes, default=0)
        if capped:
            high = min(high, max(low, self.weights_left))
        for step in range(_STEPS + 1):
            budget = high * (low / high) ** (step / _STEPS)
            try:
                # A thousandth on top: the text of a budget is rounded.
                yield plan_to_budget(profile, self.target, parse_budget(f"{budget * 1.001 / 1e3:.3f}KB"), self.sizes)
            except BudgetError:
                return

    def judge(
        self, plan: Plan, name: str, what: str, exact: bool = False, note: str = "", *, measure: bool = True
    ) -> Alternative:
        """A plan by the limits. exact: it changes nothing, its loss is 0. measure: ask `evaluate`, if there is one."""
        loss, source = (0.0, "exact") if exact else (predicted_loss(plan.choices), "predicted")
        if measure and not exact and self.evaluate is not None:
            loss, source = self.evaluate(list(plan.choices)), "measured"
        ms = milliseconds_of(plan.choices, self.costs) if self.costs.native else None
        factored = sum(not c.spec.quantization_only for c in plan.choices)
        ram = ram_of(plan, self.costs, self.facts, self.kv)
        return self.held(
            Alternative(
                name, what, plan.bytes, ram, ms, loss, "estimate", "estimate", source, False, None, None, factored, note
            )
        )

    def held(self, found: Alternative) -> Alternative:
        """The same, held against the limits."""
        limit = self.limits
        late = None if limit.latency_ms is None or found.ms is None else found.ms <= limit.latency_ms
        if late is False and self.costs.busy and found.ms_from != "measured":
            late = None  # an upper bound that fails proves nothing
        good = None if found.loss is None else found.loss <= limit.loss
        return replace(found, fits_ram=found.ram.total <= limit.ram, fits_latency=late, acceptable=good)


def dense_only(profile: Profiled) -> Trimmed:
    """The profile as quantization alone sees it."""
    return Trimmed(
        profile.fingerprint,
        [replace(p, candidates=tuple(c for c in p.candidates if c.spec.quantization_only)) for p in profile.layers],
    )


def alternatives(desk: Desk) -> list[Alternative]:
    """From the simplest to the most complicated: nothing, one format for all, formats by layer, the full pipeline."""
    firsts: dict[int, str] = {}
    for name in desk.target.dense_formats:
        firsts.setdefault(CoreFormat.parse(name).bits, name)
    found = []
    for fmt in ("fp32", "fp16", *(firsts[bits] for bits in sorted(firsts, reverse=True))):
        try:
            found.append(desk.uniform(fmt))
        except PlanError:  # no layer of this model has that form on the target
            continue
    mixed = desk.searched("dense, bits by layer", QUANTIZATION, dense_only(desk.profile))
    full = desk.searched("full pipeline", PIPELINE, desk.profile)
    return found + [a for a in (mixed, full) if a is not None]
