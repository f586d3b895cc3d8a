"""Makes the Plan: from a profile under a budget, or from a constraint that bypasses the search.

Whatever the allocation predicts, the plan that ships is the one that *measured* best on text the statistics did
not see: the allocated plan and the best uniform plan of every kind are each tried end to end through the
`evaluate` callback, so searching can never do worse than not searching.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from edgec.contraction import flops
from edgec.errors import BudgetError, PlanError, UsageError
from edgec.fit import contraction_of, stored_bytes
from edgec.modeling import Layer
from edgec.plan.allocation import Option, allocate, layer_items, pick
from edgec.plan.budget import Budget
from edgec.plan.candidates import FALLBACK, RATIOS, executable, uniform
from edgec.quantize.formats import CoreFormat, LayerFormat
from edgec.records import Choice, LayerProfile, Plan, Spec, Target

logger = logging.getLogger(__name__)

Evaluate = Callable[[list[Choice]], float]
"""Measured end-to-end loss of the choices applied to the model, on text that did not calibrate."""


class Profiled(Protocol):
    """What the planner reads of a `profile.store.Profile`; the record itself stays in its room."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def layers(self) -> Sequence[LayerProfile]: ...


@dataclass(frozen=True)
class Sizes:
    """What a budget is counted against. parameters: distinct ones of the checkpoint. other_bytes: what ships in
    the model file beside the planned layers. runtime_files: tokenizer and configuration beside the model file
    [bytes].
    """

    parameters: int
    other_bytes: int
    runtime_files: int = 0


def plan_to_budget(
    profile: Profiled, target: Target, budget: Budget, sizes: Sizes, evaluate: Evaluate | None = None
) -> Plan:
    """The best measured plan within the budget. Raises BudgetError naming the floor when there is none."""
    choices = {p.name: _offered(p, target) for p in profile.layers}
    tied = [(p.name, p.tied_to) for p in profile.layers if p.tied_to]
    plans = [("allocated", _allocate(choices, tied, budget, sizes))]
    notes = [
        f"{p.name}: incompressible (spectrum of a random matrix), kept dense"
        for p in profile.layers
        if p.incompressible
    ]
    if evaluate is not None:
        plans += _uniform_rivals(choices, tied, target, budget, sizes)
        name, chosen, measured = pick(plans, evaluate)
        notes.append("measured loss: " + ", ".join(f"{n} {v:.3g}" for n, v in measured.items()) + f"; chosen: {name}")
    else:
        chosen = plans[0][1]
    return Plan(
        profile.fingerprint, target.name, str(budget), _ordered(chosen, profile), sizes.other_bytes, tuple(notes)
    )


def _offered(layer: LayerProfile, target: Target) -> list[Choice]:
    tied = layer.tied_to is not None
    return [
        c
        for c in layer.candidates
        if executable(target, c.role, c.shape, c.spec, LayerFormat.parse(c.format), tied=tied)
        and not (layer.incompressible and c.spec.kind != "dense")
    ]


def _allocate(
    choices: dict[str, list[Choice]], tied: Sequence[tuple[str, str]], budget: Budget, sizes: Sizes
) -> list[Choice]:
    if budget.kind == "linear":
        linears = [c for c in choices.values() if c and c[0].role == "linear"]
        parameters = sum(c[0].shape[0] * c[0].shape[1] for c in linears)
        items = layer_items(linears)
        if (floor := _smallest(items)) > budget.linear_bytes(parameters):
            raise BudgetError(
                f"budget {budget} is below the floor of this model: its block linears need "
                f"{floor / 1e6:.2f} MB at their smallest. Raise it to --budget {budget.raised_to(floor, parameters)}"
            )
        return allocate(items, budget.linear_bytes(parameters)) + _at_int8(choices, tied)
    items = layer_items(list(choices.values()), tied)
    left = budget.model_bytes(sizes.parameters, sizes.runtime_files) - sizes.other_bytes
    if (floor := _smallest(items)) > left:
        # The graph is an estimate until it is written: a tenth on top, so that what is named here is enough.
        wanted = budget.raised_to(floor + 1.1 * sizes.other_bytes, sizes.parameters, sizes.runtime_files)
        beside = f" and {sizes.runtime_files / 1e6:.2f} MB of files beside it" if budget.kind == "size" else ""
        raise BudgetError(
            f"budget {budget} is below the floor of this model: {floor / 1e6:.2f} MB with every layer "
            f"at its smallest, {sizes.other_bytes / 1e6:.2f} MB of norms, biases and graph{beside}. Raise it to "
            f"--budget {wanted}"
        )
    return allocate(items, left)


def _smallest(items: Sequence[Sequence[Option]]) -> int:
    return sum(min(option.bytes for option in options) for options in items)


def _at_int8(choices: dict[str, list[Choice]], tied: Sequence[tuple[str, str]]) -> list[Choice]:
    """Embeddings and head at int8, as figures on linears keep them: the best 8-bit format that the target has, else
    the best of all.
    """
    heads = {head for head, _ in tied}
    found = []
    for name, offered in choices.items():
        dense = [c for c in offered if c.spec.kind == "dense" and c.role != "linear"]
        if not dense:
            continue
        eight = [c for c in dense if CoreFormat.parse(c.format).bits == 8] or dense
        best = min(eight, key=lambda c: (c.loss if c.loss is not None else c.error or 0.0, c.bytes))
        found.append(replace(best, bytes=0) if name in heads else best)
    by_name = {c.layer: c for c in found}
    for head, table in tied:  # one shared table: the head follows the embedding
        by_name[head] = replace(by_name[head], format=by_name[table].format)
    return list(by_name.values())


def _uniform_rivals(
    choices: dict[str, list[Choice]], tied: Sequence[tuple[str, str]], target: Target, budget: Budget, sizes: Sizes
) -> list[tuple[str, list[Choice]]]:
    """The best feasible uniform plan of every kind by predicted loss: dense at one format, low rank at one ratio and
    format.
    """
    best: dict[str, tuple[float, str, list[Choice]]] = {}
    variants: list[tuple[str, float, str]] = [("dense", 1.0, f) for f in target.dense_formats]
    variants += [("svd " + f, ratio, f) for f in target.factored_formats for ratio in RATIOS]
    for family, ratio, fmt in variants:
        try:
            plan = _restricted(choices, tied, target, budget, sizes, ratio, fmt)
        except PlanError:  # over budget, or not executable for some layer: not a rival
            continue
        predicted = sum(Option((c,)).loss for c in plan)
        if family not in best or predicted < best[family][0]:
            best[family] = (predicted, f"uniform {ratio:g} {fmt}" if ratio < 1 else f"uniform {fmt}", plan)
    return [(name, plan) for _, name, plan in best.values()]


def _restricted(
    choices: dict[str, list[Choice]],
    tied: Sequence[tuple[str, str]],
    target: Target,
    budget: Budget,
    sizes: Sizes,
    ratio: float,
    fmt: str,
) -> list[Choice]:
    """The plan whose every block linear has this one form, everything else allocated as usual."""
    fixed: dict[str, list[Choice]] = {}
    linears = matched = 0
    for name, offered in choices.items():
        if not offered or offered[0].role != "linear":
            fixed[name] = offered
            continue
        spec = uniform(offered[0].shape, ratio, target.rank_multiple)
        exact = [c for c in offered if c.spec == spec and c.format == fmt]
        dense = {c.format: c for c in offered if c.spec.kind == "dense"}
        stand_in = dense.get(fmt) or dense.get(str(FALLBACK))
        if not exact and stand_in is None:
            raise PlanError(f"layer {name!r} has no form in {fmt}")
        fixed[name] = exact or [c for c in (stand_in,) if c is not None]
        linears += 1
        matched += bool(exact)
    if 2 * matched < linears:
        raise PlanError(f"only {matched} of {linears} layers can be {ratio:g} of their parameters in {fmt}")
    return _allocate(fixed, tied, budget, sizes)


def _ordered(choices: Iterable[Choice], profile: Profiled) -> tuple[Choice, ...]:
    by_name = {c.layer: c for c in choices}
    return tuple(by_name[p.name] for p in profile.layers if p.name in by_name)


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
