"""edgec's own contestants: for each budget, the plan that the pipeline would ship, fitted. Activations are floats for
every contestant here, so plans may hold the rotated forms that an export of an encoder leaves out beside int8 products.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from edgec.fit import Factors
from edgec.pipeline import Goal, Progress, fit_drafts, refitted, search_plan
from edgec.plan.budget import parse_budget
from edgec.plan.planner import Sizes
from edgec.plan.refine import Search
from edgec.profile.store import Profile
from edgec.records import Target
from edgec.workspace import Workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Planned:
    """The answer to one budget: factors of every block linear, their stored bytes, and what the layers became."""

    name: str
    factors: Mapping[str, Factors]
    linear_bytes: int
    form: str


class Planner(Protocol):
    """budget text ("4bpw-linear") → plan and factors. Raises BudgetError below the floor."""

    def __call__(self, budget: str) -> Planned: ...


def pipeline_planner(
    workspace: Workspace, target: Target, found: Profile, search: Search, progress: Progress
) -> Planner:
    """The pipeline's own search, on text of its own, and the best plan fitted."""

    def plan(budget: str) -> Planned:
        def told(stage: str, done: int, total: int) -> None:
            progress(f"planning {budget}", done, total)

        sizes = Sizes(workspace.checkpoint.parameters, other_bytes=0)  # a budget on linears counts nothing else
        made = search_plan(workspace, found, target, Goal(parse_budget(budget), search=search), sizes, told)
        linears = [c for c in made.choices if c.role == "linear"]
        drafts = fit_drafts(workspace, made.choices, found, told)
        whole, note = refitted(workspace, made.choices, drafts, found.statistics.moment, told)
        logger.info("%s: %s", budget, note or "not fitted block by block")
        factors = {c.layer: whole[c.layer] for c in linears}
        size = sum(fitted.stored_bytes for fitted in factors.values())
        return Planned(f"edgec {budget}", factors, size, mixture(f"{c.spec.kind} {c.format}" for c in linears))

    return plan


def mixture(forms: Iterable[str]) -> str:
    """"24× svd int4-b32, 12× dense int4-b64", most frequent first."""
    counts = Counter(forms)
    shown = [f"{count}× {form}" for form, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    return ", ".join(shown[:4]) + (f", {len(shown) - 4} more" if len(shown) > 4 else "")
