"""What a plan may choose from and what it must keep within: candidates, tied pairs, budget, pace.

An `Offer` turns any losses (predicted, corrected, tilted) into the best plan that keeps the budget, so that the
searches above it never see bytes and cannot overspend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from edgec.errors import BudgetError, PlanError
from edgec.plan.allocation import Option, allocate, layer_items
from edgec.plan.budget import Budget
from edgec.plan.candidates import FALLBACK, RATIOS, executable, uniform
from edgec.plan.corrections import predicted
from edgec.plan.latency import Pace
from edgec.quantize.formats import CoreFormat, LayerFormat
from edgec.records import Choice, LayerProfile, Target

Loss = Callable[[Choice], float]


@dataclass(frozen=True)
class Sizes:
    """What a budget is counted against. parameters: distinct ones of the checkpoint. other_bytes: what ships in
    the model file beside the planned layers. runtime_files: tokenizer and configuration beside the model file
    [bytes].
    """

    parameters: int
    other_bytes: int
    runtime_files: int = 0


@dataclass(frozen=True)
class Offer:
    """choices: layer → its candidates. tied: (head, embedding) pairs that share a table."""

    choices: Mapping[str, Sequence[Choice]]
    tied: Sequence[tuple[str, str]]
    budget: Budget
    sizes: Sizes
    pace: Pace | None = None

    @classmethod
    def of(
        cls, layers: Sequence[LayerProfile], target: Target, budget: Budget, sizes: Sizes, pace: Pace | None = None
    ) -> Offer:
        """What a profile offers on a target."""
        tied = [(p.name, p.tied_to) for p in layers if p.tied_to]
        return cls({p.name: _executable(p, target) for p in layers}, tied, budget, sizes, pace)

    def linears_only(self, keep: Callable[[Choice], bool]) -> Offer:
        """The offer whose block linears are restricted to what `keep` accepts, wherever it accepts anything."""
        kept = {
            name: [c for c in offered if c.role != "linear" or keep(c)] or offered
            for name, offered in self.choices.items()
        }
        return replace(self, choices=kept)

    def allocate(self, loss: Loss = predicted) -> list[Choice]:
        """The plan of least summed loss within budget and pace; its choices carry the losses that were predicted.
        Raises BudgetError naming the floor.
        """
        plan = self._spent(loss, self.pace.weight if self.pace else 0.0)
        if self.pace is None or self.pace.cap is None or self.pace.of(plan) <= self.pace.cap:
            return plan
        return self._within_cap(loss, self.pace, self.pace.cap)

    def _within_cap(self, loss: Loss, pace: Pace, cap: float) -> list[Choice]:
        """Lagrange: the lowest price of a millisecond at which the plan keeps the cap, by bisection."""
        cheapest = self._spent(lambda choice: 0.0, 1.0)
        if pace.of(cheapest) > cap:
            raise BudgetError(
                f"no plan within the size budget takes less than {pace.of(cheapest):.3g} ms, asked for {cap:.3g} ms; "
                "raise the latency"
            )
        usual = sum(map(loss, cheapest)) / max(pace.of(cheapest), 1e-9) or 1.0  # loss per ms, about
        low, high, plan = usual * 1e-4, usual * 1e2, cheapest
        for _ in range(12):
            middle = math.sqrt(low * high)
            tried = self._spent(loss, pace.weight + middle)
            if pace.of(tried) <= cap:
                high, plan = middle, tried
            else:
                low = middle
        return plan

    def _spent(self, loss: Loss, price: float) -> list[Choice]:
        """price: loss that a millisecond is worth."""

        def priced(choice: Choice) -> float:
            return loss(choice) + (price * self.pace.ms(choice) if self.pace and price else 0.0)

        weighed = {name: [replace(c, loss=priced(c)) for c in offered] for name, offered in self.choices.items()}
        original = {(c.layer, c.spec, c.format): c for offered in self.choices.values() for c in offered}
        plan = _allocate(weighed, self.tied, self.budget, self.sizes)
        return [replace(original.get((c.layer, c.spec, c.format), c), bytes=c.bytes) for c in plan]

    @property
    def floor(self) -> int:
        """Bytes of what the budget limits, with every layer at its smallest."""
        return _smallest(layer_items(self._limited(), self._limited_pairs()))

    @property
    def limited_parameters(self) -> int:
        """Parameters that a budget in bits per weight divides by: of the block linears, or of the checkpoint."""
        if self.budget.kind != "linear":
            return self.sizes.parameters
        return sum(c[0].shape[0] * c[0].shape[1] for c in self._limited())

    def limited_bytes(self, choices: Sequence[Choice]) -> int:
        """What a plan spends of the budget, other files left out [bytes]."""
        return sum(c.bytes for c in choices if self.budget.kind != "linear" or c.role == "linear")

    def at(self, limited: float) -> Offer:
        """The same offer with so many bytes to spend, as `limited_bytes` counts them."""
        beside = 0 if self.budget.kind == "linear" else self.sizes.other_bytes
        kind = "linear" if self.budget.kind == "linear" else "total"
        bits = 8 * (limited + beside) / self.limited_parameters * (1 + 1e-12)  # the way back is rounded
        return replace(self, budget=Budget(kind, bits, f"{bits:.2f}bpw" + ("-linear" if kind == "linear" else "")))

    def _limited(self) -> list[Sequence[Choice]]:
        every = [c for c in self.choices.values() if c]
        return [c for c in every if c[0].role == "linear"] if self.budget.kind == "linear" else every

    def _limited_pairs(self) -> Sequence[tuple[str, str]]:
        return () if self.budget.kind == "linear" else self.tied

    def fits(self, choices: Sequence[Choice]) -> bool:
        """Does a whole plan keep budget and pace?"""
        linears = [c for c in choices if c.role == "linear"]
        parameters = sum(c.shape[0] * c.shape[1] for c in linears)
        total = sum(c.bytes for c in choices) + self.sizes.other_bytes
        within = sum(c.bytes for c in linears) <= self.budget.linear_bytes(parameters)
        within &= total <= self.budget.model_bytes(self.sizes.parameters, self.sizes.runtime_files)
        capped = self.pace is not None and self.pace.cap is not None
        return within and not (capped and self.pace.of(choices) > self.pace.cap)  # type: ignore[union-attr,operator]

    def best(self, layer: str) -> Choice:
        """The most faithful candidate of a layer, whatever it costs."""
        return min(self.choices[layer], key=lambda c: (predicted(c), c.bytes))


def _executable(layer: LayerProfile, target: Target) -> list[Choice]:
    tied = layer.tied_to is not None
    return [
        c
        for c in layer.candidates
        if executable(target, c.role, c.shape, c.spec, LayerFormat.parse(c.format), tied=tied)
        and not (layer.incompressible and c.spec.kind != "dense")
    ]


def _allocate(
    choices: Mapping[str, Sequence[Choice]], tied: Sequence[tuple[str, str]], budget: Budget, sizes: Sizes
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


def _at_int8(choices: Mapping[str, Sequence[Choice]], tied: Sequence[tuple[str, str]]) -> list[Choice]:
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


def uniform_rivals(offer: Offer, target: Target) -> list[tuple[str, list[Choice]]]:
    """The best feasible uniform plan of every kind by predicted loss: dense at one format, low rank at one ratio and
    format.
    """
    best: dict[str, tuple[float, str, list[Choice]]] = {}
    variants: list[tuple[str, float, str]] = [("dense", 1.0, f) for f in target.dense_formats]
    variants += [("svd " + f, ratio, f) for f in target.factored_formats for ratio in RATIOS]
    for family, ratio, fmt in variants:
        try:
            plan = _restricted(offer, target, ratio, fmt)
        except PlanError:  # over budget, or not executable for some layer: not a rival
            continue
        loss = sum(map(predicted, plan))
        if family not in best or loss < best[family][0]:
            best[family] = (loss, f"uniform {ratio:g} {fmt}" if ratio < 1 else f"uniform {fmt}", plan)
    return [(name, plan) for _, name, plan in best.values()]


def _restricted(offer: Offer, target: Target, ratio: float, fmt: str) -> list[Choice]:
    """The plan whose every block linear has this one form, everything else allocated as usual."""
    fixed: dict[str, Sequence[Choice]] = {}
    linears = matched = 0
    for name, offered in offer.choices.items():
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
    return replace(offer, choices=fixed).allocate()
