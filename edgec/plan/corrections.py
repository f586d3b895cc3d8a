"""What measured plans teach about predicted losses: a factor per form, per depth and per kind of matrix.

K-FAC predicts what one layer's error adds while everything else is exact and the loss is quadratic. Measured, whole
plans are off by forms (rounding is not low rank), by depth (what early blocks lose, later ones amplify) and by size
(errors of many layers overlap). Each measured plan m gives one equation

    log L_m  ≈  log L* + (1 + κ) (log Σ_i p_i · Π_g∋i exp θ_g  −  log L*)

with p_i the predicted losses of its choices, θ_g one number for each group that a choice is in, κ the overlap and L*
the least loss measured; θ and κ are the ridge solution (prior: the prediction is right, θ = κ = 0). A factor per layer
was turned down: a search measures a dozen plans, and a dozen equations do not hold a hundred unknowns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from edgec.records import Choice

MAX_DEPTHS = 6
"""Blocks are told apart in at most so many groups of consecutive ones."""

_PRIOR = {"form": 0.7, "depth": 0.4, "matrix": 0.4}
"""How far [nats] a factor may be expected from 1: forms are off by a factor of 2 where depths are off by 1.5."""
_OVERLAP_PRIOR = 0.2
_CLOSE, _FAR = 0.01, 0.25
"""Expected misfit [nats] of a plan as good as the best one, and of one whose loss is e times as large."""

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def predicted(choice: Choice) -> float:
    """The loss that the profile predicts; its squared functional error where it predicts none."""
    return choice.loss if choice.loss is not None else (choice.error or 0.0) ** 2


def block_of(layer: str) -> int | None:
    """Index of the transformer block that a layer is in: 3 of "model.layers.3.mlp.up_proj"; None outside the blocks."""
    found = _NUMBER.search(layer)
    return int(found[1]) if found else None


def form_of(choice: Choice) -> str:
    """Decomposition and bits without the block size: "svd int4", "residual int2+int8"; tables apart."""
    bits = "+".join(part.partition("-")[0] for part in choice.format.split("+"))
    return f"{choice.role} {choice.spec.kind} {bits}" if choice.role != "linear" else f"{choice.spec.kind} {bits}"


@dataclass(frozen=True)
class Groups:
    """Which groups a choice is in. blocks: how many transformer blocks the model has."""

    blocks: int

    @classmethod
    def of_layers(cls, layers: Sequence[str]) -> Groups:
        return cls(1 + max((b for b in map(block_of, layers) if b is not None), default=-1))

    def of(self, choice: Choice) -> tuple[str, ...]:
        """Such as ("form: svd int4", "depth: 2", "matrix: mlp.up_proj"); outside the blocks, the form alone."""
        block = block_of(choice.layer)
        if block is None:
            return (f"form: {form_of(choice)}",)
        depth = block * min(self.blocks, MAX_DEPTHS) // max(1, self.blocks)
        matrix = choice.layer[_NUMBER.search(choice.layer).end() :]  # type: ignore[union-attr]
        return (f"form: {form_of(choice)}", f"depth: {depth}", f"matrix: {matrix}")


@dataclass(frozen=True)
class Corrections:
    """Learned logarithms of the factors, by group; a group that is not named is taken as predicted."""

    groups: Groups
    logs: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, choice: Choice) -> float:
        """The corrected loss of a choice."""
        return predicted(choice) * math.exp(sum(self.logs.get(g, 0.0) for g in self.groups.of(choice)))

    def tilted(self, group: str, by: float) -> Corrections:
        """The same with one group's losses times e^by."""
        return Corrections(self.groups, {**self.logs, group: self.logs.get(group, 0.0) + by})

    def shares(self, choices: Sequence[Choice]) -> dict[str, float]:
        """Group → its share of a plan's corrected loss, largest first."""
        total = sum(map(self, choices)) or 1.0
        found: dict[str, float] = {}
        for choice in choices:
            for group in self.groups.of(choice):
                found[group] = found.get(group, 0.0) + self(choice) / total
        return dict(sorted(found.items(), key=lambda entry: (-entry[1], entry[0])))


def learn(groups: Groups, records: Sequence[tuple[Sequence[Choice], float]]) -> Corrections:
    """The factors that make the predictions of measured plans (choices, loss) fit what was measured."""
    usable = [(c, loss) for c, loss in records if 0 < loss < math.inf and sum(map(predicted, c)) > 0]
    if not usable:
        return Corrections(groups)
    names = sorted({g for choices, _ in usable for c in choices for g in groups.of(c)})
    place = {name: i for i, name in enumerate(names)}
    cells: dict[tuple[str, ...], int] = {}
    entries = []
    for row, (choices, _) in enumerate(usable):
        for choice in choices:
            cell = cells.setdefault(groups.of(choice), len(cells))
            entries.append((row, cell, predicted(choice)))
    sums = np.zeros((len(usable), len(cells)))
    for row, cell, loss in entries:
        sums[row, cell] += loss
    member = np.zeros((len(cells), len(names)))
    for key, cell in cells.items():
        member[cell, [place[g] for g in key]] = 1.0
    measured = np.log([loss for _, loss in usable])
    best = float(measured.min())
    sigma = _CLOSE + _FAR * (measured - best)
    prior = np.array([_PRIOR[name.partition(":")[0]] for name in names] + [_OVERLAP_PRIOR])

    def model(x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        weighed = sums * np.exp(member @ x[:-1])
        total = weighed.sum(1)
        return np.log(total), (weighed @ member) / total[:, None]

    def residual(x: NDArray[Any]) -> NDArray[Any]:
        logs, _ = model(x)
        return np.concatenate([(best + (1 + x[-1]) * (logs - best) - measured) / sigma, x / prior])

    def jacobian(x: NDArray[Any]) -> NDArray[Any]:
        logs, slopes = model(x)
        data = np.column_stack([(1 + x[-1]) * slopes, logs - best]) / sigma[:, None]
        return np.concatenate([data, np.diag(1 / prior)])

    bound = np.append(np.full(len(names), 4.0), 0.8)
    found = least_squares(residual, np.zeros(len(prior)), jacobian, bounds=(-bound, bound), max_nfev=200)
    return Corrections(groups, {name: float(found.x[i]) for name, i in place.items()})
