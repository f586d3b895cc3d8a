"""Makes the Plan: from a profile under a budget, or from a constraint that bypasses the search.

Whatever the allocation predicts, the plan that ships is the one that *measured* best on text the statistics did
not see: the allocated plan, the best uniform plan of every kind and what `refine` makes of them are each tried end to
end through the `evaluate` callback, so searching can never do worse than not searching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from edgec.contraction import flops
from edgec.errors import PlanError, UsageError
from edgec.fit import contraction_of, stored_bytes
from edgec.modeling import Layer
from edgec.plan.anneal import anneal
from edgec.plan.budget import Budget
from edgec.plan.candidates import FALLBACK, executable, uniform
from edgec.plan.corrections import Groups, block_of, learn
from edgec.plan.latency import Pace
from edgec.plan.offer import Offer, uniform_rivals
from edgec.plan.offer import Sizes as Sizes
from edgec.plan.refine import Evaluate as Evaluate
from edgec.plan.refine import Found, Ledger, Progress, Search, refine
from edgec.quantize.formats import CoreFormat, LayerFormat
from edgec.records import Choice, LayerProfile, Plan, Spec, Target

_SHARE_OF_A_RIVAL = 4
"""A structurally different finalist is refined with this fraction of the evaluations that the mix has."""


class Profiled(Protocol):
    """What the planner reads of a `profile.store.Profile`; the record itself stays in its room."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def layers(self) -> Sequence[LayerProfile]: ...


def plan_to_budget(
    profile: Profiled,
    target: Target,
    budget: Budget,
    sizes: Sizes,
    evaluate: Evaluate | None = None,
    search: Search | None = None,
    *,
    confirm: Evaluate | None = None,
    pace: Pace | None = None,
    progress: Progress | None = None,
) -> Plan:
    """The best measured plan within the budget; without `evaluate`, the best predicted one.

    confirm: loss on a second held-out text, for `Search("anneal")`. pace: milliseconds as a second objective. Raises
    BudgetError naming the floor when no plan fits.
    """
    offer = Offer.of(profile.layers, target, budget, sizes, pace)
    if evaluate is None:
        return plan_of(profile, target, str(budget), sizes, offer.allocate())
    search = search or Search()
    if search.method == "anneal" and confirm is None:
        raise PlanError("an annealed plan is kept only if a second text confirms it; give `confirm`")
    if search.method == "anneal" and search.seconds is not None:
        search = replace(search, seconds=search.seconds / 2)  # one half refines, the other anneals
    ledger = Ledger(evaluate, _penalty(pace))
    found = refine(offer, _starts(offer, target), ledger, search, progress)
    notes = _search_notes(found, search)
    if search.method == "anneal" and confirm is not None:
        found, note = anneal(offer, found, ledger, search, confirm, progress)
        notes.append(note)
    return plan_of(profile, target, str(budget), sizes, found.choices, notes)


def plan_of(
    profile: Profiled, target: Target, budget: str, sizes: Sizes, choices: Iterable[Choice], notes: Sequence[str] = ()
) -> Plan:
    """The record of a finished choice, its layers in the model's order; notes on how it was found come last."""
    by_name = {c.layer: c for c in choices}
    ordered = tuple(by_name[p.name] for p in profile.layers if p.name in by_name)
    kept = [
        f"{p.name}: incompressible (spectrum of a random matrix), kept dense"
        for p in profile.layers
        if p.incompressible
    ]
    plan = Plan(profile.fingerprint, target.name, budget, ordered, sizes.other_bytes)
    return replace(plan, notes=(*kept, *protection_note(plan), *notes))


def protection_note(plan: Plan) -> tuple[str, ...]:
    """How many bits the first, the last and the other blocks got: an outcome of the search, not a rule. One sentence;
    none for fewer than three blocks.
    """
    spent: dict[int, tuple[int, int]] = {}
    for choice in plan.choices:
        block = block_of(choice.layer)
        if choice.role == "linear" and block is not None:
            size, parameters = spent.get(block, (0, 0))
            spent[block] = (size + choice.bytes, parameters + choice.shape[0] * choice.shape[1])
    if len(spent) < 3:
        return ()

    def bits(blocks: Sequence[int]) -> float:
        return 8 * sum(spent[b][0] for b in blocks) / sum(spent[b][1] for b in blocks)

    first, *between, last = sorted(spent)
    return (
        f"bits per weight: first block {bits([first]):.2f}, last block {bits([last]):.2f}, "
        f"the others {bits(between):.2f}",
    )


def finalists(
    profile: Profiled,
    target: Target,
    budget: Budget,
    sizes: Sizes,
    evaluate: Evaluate,
    search: Search | None = None,
    *,
    pace: Pace | None = None,
    progress: Progress | None = None,
) -> list[tuple[str, list[Choice], float]]:
    """(name, choices, measured loss) of the best plan and of the best ones of another structure, best first.

    "mix" is the refined plan. "factored", "dense" and "residual" restrict the block linears to these forms wherever
    there is one, and are left out where the mix already is one or nothing of that structure fits. Healing may
    reverse their order: factors have more to learn than rounding has. Raises BudgetError and PlanError like
    `plan_to_budget`.
    """
    search = search or Search()
    offer = Offer.of(profile.layers, target, budget, sizes, pace)
    ledger = Ledger(evaluate, _penalty(pace))
    mix = refine(offer, _starts(offer, target), ledger, search, progress)
    found = [("mix", mix.choices, mix.loss)]
    less = replace(search, evaluations=max(1, search.evaluations // _SHARE_OF_A_RIVAL))
    for name, keep in _STRUCTURES.items():
        restricted = offer.linears_only(keep)
        if not any(keep(c) for offered in offer.choices.values() for c in offered if c.role == "linear"):
            continue
        allowed = {(c.layer, c.spec, c.format) for offered in restricted.choices.values() for c in offered}
        if all((c.layer, c.spec, c.format) in allowed for c in mix.choices if c.role == "linear"):
            continue
        corrections = learn(Groups.of_layers(list(offer.choices)), ledger.records)
        try:
            starts = [(name, restricted.allocate(corrections))]
            best = refine(restricted, starts, ledger, less, progress)
        except PlanError:  # below this structure's floor, or broken by it: not a finalist
            continue
        found.append((name, best.choices, best.loss))
    return sorted(found, key=lambda entry: entry[2])


_STRUCTURES: dict[str, Callable[[Choice], bool]] = {
    "factored": lambda c: c.spec.factored,
    "dense": lambda c: c.spec.quantization_only,
    "residual": lambda c: c.spec.kind == "residual",
}


def _starts(offer: Offer, target: Target) -> list[tuple[str, list[Choice]]]:
    rivals = [(name, plan) for name, plan in uniform_rivals(offer, target) if offer.fits(plan)]
    return [("allocated", offer.allocate()), *rivals]


def _penalty(pace: Pace | None) -> Callable[[Sequence[Choice]], float]:
    if pace is None:
        return lambda choices: 0.0
    weight, of = pace.weight, pace.of

    def penalty(choices: Sequence[Choice]) -> float:
        return weight * of(choices)

    return penalty


def _search_notes(found: Found, search: Search) -> list[str]:
    notes = []
    if search.method != "none":
        gain = f"{100 * (1 - found.loss / found.before):.1f} % lower" if found.loss < found.before else "no lower"
        notes.append(
            f"search: {found.evaluations} plans measured; the best has {found.loss:.3g}, {gain} than the best of the "
            f"allocated and uniform plans ({found.before:.3g})"
        )
    named = ", ".join(f"{name} {loss:.3g}" for name, loss in found.named.items())
    return [*notes, f"measured loss: {named}; chosen: {found.name}"]


def constrained_plan(
    text: str, layers: Sequence[Layer], target: Target, fingerprint: str, other_bytes: int = 0
) -> Plan:
    """A plan that bypasses the search. text: "uniform:RATIO[:FORMAT]" (every block linear and the head at that
    share of its parameters) or "dense:FORMAT" (no factoring; "dense:fp32" is the dense model). Raises UsageError.
    """
    kind, _, rest = text.partition(":")
    if kind == "uniform" and rest:
        value, _, name = rest.partition(":")
        try:
            ratio = float(value)
        except ValueError:
            ratio = 0.0
        if not 0 < ratio <= 1:
            raise UsageError(f"--plan {text}: the ratio must be a number in (0, 1]")
    elif kind == "dense" and rest:
        ratio, name = 1.0, rest
    else:
        raise UsageError(f"--plan {text!r}: expected a YAML file, uniform:RATIO[:FORMAT] or dense:FORMAT")
    fmt = CoreFormat.parse(name or target.default_format)
    choices = tuple(_uniform_choices(layers, target, ratio, fmt))
    multiplied = [c for c in choices if c.role != "embedding"]
    linears = [c for c in choices if c.role == "linear"]
    others = [c for c in multiplied if c.format != str(fmt)]
    if linears and all(c.format != str(fmt) for c in linears):
        raise PlanError(
            f"--plan {text}: {target.name} executes no layer of this model in {fmt}; `edgec targets {target.name}` "
            "lists what it does"
        )
    notes = [f"{c.layer}: {c.spec} {c.format}, since {target.name} does not execute it in {fmt}" for c in others]
    if whole := sum(ratio < 1 and c.spec.kind == "dense" for c in multiplied):
        notes.append(
            f"{whole} of {len(multiplied)} layers are dense: no rank that {target.name} runs is {ratio:g} of them"
        )
    return Plan(fingerprint, target.name, text, choices, other_bytes, tuple(notes))


def _uniform_choices(layers: Sequence[Layer], target: Target, ratio: float, fmt: CoreFormat) -> Iterable[Choice]:
    formats: dict[str, CoreFormat] = {}
    for layer in layers:
        own = fmt
        if layer.role == "embedding":
            spec = Spec("dense")
            # Tables are looked up, not multiplied: they follow the cores' bits where a lookup kernel has them.
            if fmt.quantised:
                names = [n for n in target.embedding_formats if CoreFormat.parse(n).bits == max(4, fmt.bits)]
                own = CoreFormat.parse((names or list(target.embedding_formats))[0])
        else:
            spec = uniform(layer.shape, ratio, target.rank_multiple)
        tied = layer.tied_to is not None and spec.kind == "dense"
        if tied and layer.tied_to in formats:
            own = formats[layer.tied_to]
        if not executable(target, layer.role, layer.shape, spec, own, tied=tied):
            spec, own = Spec("dense"), FALLBACK if fmt.quantised else fmt
        formats[layer.name] = own
        shared = tied and formats.get(layer.tied_to or "") == own
        yield make_choice(layer, spec, own, shared=shared)


def make_choice(layer: Layer, spec: Spec, fmt: LayerFormat, *, shared: bool = False) -> Choice:
    """A Choice with its costs, before any numbers are looked at. shared: the tied table already counts the bytes."""
    return Choice(
        layer=layer.name,
        role=layer.role,
        shape=layer.shape,
        spec=spec,
        format=str(fmt),
        bytes=0 if shared else stored_bytes(spec, layer.shape, layer.role, fmt),
        flops=flops(contraction_of(spec, layer.shape, layer.role)),
    )


def check_plan(plan: Plan, layers: Sequence[Layer], target: Target, fingerprint: str) -> None:
    """Refuse a plan that does not fit the model or the target. Raises PlanError naming the layer."""
    if plan.fingerprint != fingerprint:
        raise PlanError(f"the plan is for {plan.fingerprint[:19]}…, this checkpoint is {fingerprint[:19]}…; plan again")
    known = {layer.name: layer for layer in layers}
    for choice in plan.choices:
        layer = known.get(choice.layer)
        if layer is None:
            raise PlanError(f"the plan names layer {choice.layer!r}, which the model does not have")
        if layer.shape != choice.shape or layer.role != choice.role:
            raise PlanError(
                f"layer {layer.name!r} is {layer.role} {layer.shape}, the plan says {choice.role} {choice.shape}"
            )
        fmt = LayerFormat.parse(choice.format)
        try:
            contraction_of(choice.spec, choice.shape, choice.role)
        except PlanError as error:
            raise PlanError(f"layer {layer.name!r}: {error}") from error
        if not executable(target, layer.role, layer.shape, choice.spec, fmt, tied=layer.tied_to is not None):
            raise PlanError(
                f"layer {layer.name!r}: {target.name} does not execute {choice.spec} in {fmt}; "
                f"`edgec targets {target.name}` lists what it does"
            )
