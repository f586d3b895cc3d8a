"""The pieces that several verbs share: profiles, plans found and fitted, losses measured.

Where a stage needs a judgement from further on (a plan wants its end-to-end loss) it gets a callback from here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from edgec.calibration import Batches
from edgec.compress.apply import fit_choices
from edgec.compress.streaming import FitChoice, stream_fit
from edgec.errors import EdgecError, ProfileError, UnsupportedModelError, UsageError
from edgec.export.artifacts import ArtifactKind
from edgec.export.targets import get_target
from edgec.fit import DRAFT, Factors
from edgec.modeling import Layer
from edgec.moments import SecondMoment
from edgec.plan import files as plan_files
from edgec.plan.acceptance import Line, plan_to_loss
from edgec.plan.budget import Budget
from edgec.plan.candidates import candidates
from edgec.plan.latency import Pace
from edgec.plan.planner import Sizes, check_plan, constrained_plan, plan_to_budget
from edgec.plan.refine import Search, key_of
from edgec.profile.activations import bytes_needed, collect
from edgec.profile.profiler import build_profile
from edgec.profile.store import Profile, load_profile
from edgec.quantize.formats import LayerFormat
from edgec.records import Choice, Plan, Target
from edgec.workspace import Workspace, require_text

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""(stage, done, total): the command line draws bars from it."""


def silent(stage: str, done: int, total: int) -> None:
    """No progress wanted."""


@dataclass(frozen=True)
class Goal:
    """What a plan is to reach: a budget, or a line of loss with the fewest bytes; and how hard to look for it.

    max_ms: most milliseconds of the planned layers, or None; pace: what `pipeline.pace` found forms to cost.
    """

    budget: Budget | None = None
    line: Line | None = None
    search: Search = field(default_factory=Search)
    max_ms: float | None = None
    pace: Pace | None = None

    def __post_init__(self) -> None:
        if self.line is not None and self.search.method == "anneal":
            raise UsageError("--search anneal spends a budget; a line of loss is approached by greedy, or greedy:10min")

    def __str__(self) -> str:
        return str(self.line or self.budget)


def make_profile(workspace: Workspace, targets: list[Target], progress: Progress = silent) -> Profile:
    """Raises EdgecError where memory cannot hold what a profile measures of all layers at once."""
    require_text(workspace)
    model = workspace.model  # loaded before it is asked how much memory is left
    _require_memory(workspace)

    def offered(layer: Layer, incompressible: bool) -> list[tuple[Any, Any]]:
        tied = layer.tied_to is not None
        return candidates(targets, layer.role, layer.shape, incompressible=incompressible, tied=tied)

    made = build_profile(
        model,
        workspace.checkpoint,
        workspace.layers,
        workspace.calibration_batches,
        pooling=workspace.pooling,
        candidates=offered,
        cache=workspace.cache,
        progress=progress,
    )
    # What a target must beat is planned for from its own profile (`exporting._the_better`).
    served = [name for target in targets for name in (target.name, target.must_beat) if name]
    return replace(made, targets=tuple(dict.fromkeys(served)))


def _require_memory(workspace: Workspace) -> None:
    need = bytes_needed(workspace.layers, pooled=workspace.pooling is not None)
    have = psutil.virtual_memory().available
    if need > have:
        raise EdgecError(
            f"the statistics of all layers need about {need / 1e9:.1f} GB beside the model, {have / 1e9:.1f} GB are "
            "free; `edgec compress --plan uniform:0.5` needs those of one block at a time"
        )


def search_plan(
    workspace: Workspace,
    found: Profile,
    target: Target,
    goal: Goal,
    sizes: Sizes,
    progress: Progress,
    evaluate: Callable[[list[Choice]], float] | None = None,
) -> Plan:
    """The best plan that measuring finds. evaluate: an `evaluator` on the search text that remembers earlier plans.

    Raises BudgetError or PlanError where nothing reaches the goal.
    """

    def told(done: int, total: int, loss: float) -> None:
        progress("trying plans", done, total)

    loss = evaluate or evaluator(workspace, found, workspace.divergence_on_search)
    if goal.line is not None:
        return plan_to_loss(
            found,
            target,
            goal.line,
            sizes,
            evaluator(workspace, found, workspace.accepted_loss),
            goal.search,
            pace=goal.pace,
            progress=told,
        )
    assert goal.budget is not None
    confirm = None
    if goal.search.method == "anneal":
        second = workspace.second_batches  # too little text ends here, not after the search
        confirm = evaluator(workspace, found, lambda model: workspace.divergence(model, second))
    return plan_to_budget(
        found, target, goal.budget, sizes, loss, goal.search, confirm=confirm, pace=goal.pace, progress=told
    )


def evaluator(workspace: Workspace, found: Profile, loss: Callable[[Any], float]) -> Callable[[list[Choice]], float]:
    """Measured loss of whole plans, each measured once: choices → `loss` of the dense model with them in place."""
    known: dict[Any, float] = {}

    def evaluate(choices: list[Choice]) -> float:
        key = key_of(choices)
        if key not in known:
            known[key] = workspace.loss_with(fit_drafts(workspace, choices, found, silent), loss)
        return known[key]

    return evaluate


def fit_whole(workspace: Workspace, made: Plan, batches: Batches | None, progress: Progress) -> dict[str, Factors]:
    """Factors of a given plan on the activations of the whole dense model, in memory; plainly where there are none."""
    if batches is None:
        return fit(workspace, made.choices, lambda name: None, progress)
    statistics = collect(
        workspace.model,
        workspace.layers,
        batches,
        pooling=workspace.pooling,
        curvature=any(c.role == "embedding" and c.spec.kind != "dense" for c in made.choices),
        progress=lambda done, total: progress("calibrating", done, total),
    )
    return fit(workspace, made.choices, statistics.moment, progress)


def fit_plan(workspace: Workspace, made: Plan, plain: bool, progress: Progress) -> dict[str, Factors]:
    """Factors of a given plan: plainly, or as `compress` fits it, block by block."""
    batches = calibration_batches(workspace, made, plain)
    try:
        return fit_by_blocks(workspace, made.choices, batches, lambda done, total: progress("fitting", done, total))
    except UnsupportedModelError as error:  # blocks that share their weights, for one
        logger.info("%s: fitted as a whole (%s)", workspace.folder, error)
        return fit_whole(workspace, made, batches, progress)


def fit_by_blocks(
    workspace: Workspace,
    choices: Sequence[Choice],
    batches: Batches | None,
    progress: Callable[[int, int], None],
    fit_choice: FitChoice | None = None,
) -> dict[str, Factors]:
    """Factors of all choices, in memory, every layer on what the compressed layers before it produce. Raises
    UnsupportedModelError where the model does not run block by block.
    """
    factors: dict[str, Factors] = {}
    for group in stream_fit(
        workspace.checkpoint, workspace.layers, choices, batches, fit_choice=fit_choice, progress=progress
    ):
        factors.update(group)
    return {choice.layer: factors[choice.layer] for choice in choices}


def calibration_batches(workspace: Workspace, made: Plan, plain: bool) -> Batches | None:
    """What a given plan is fitted on; None where nothing is to be measured."""
    if plain or lossless(made.choices):
        return None
    require_text(workspace)
    batches = workspace.calibration_batches
    workspace.forget_model()
    return batches


def lossless(choices: Sequence[Choice]) -> bool:
    """Every layer dense and in floats: nothing to fit."""
    return all(c.spec.kind == "dense" and not LayerFormat.parse(c.format).quantised for c in choices)


def explicit_plan(workspace: Workspace, text: str, target: str) -> Plan:
    """--plan: a YAML file, or a constraint such as uniform:0.5."""
    fingerprint, chosen = workspace.checkpoint.fingerprint, get_target(target)
    if Path(text).is_file():
        made = plan_files.read_plan(Path(text), workspace.layers)
        check_plan(made, workspace.layers, chosen, fingerprint)
        return made
    if ":" not in text:
        raise UsageError(f"--plan {text}: no such file, and not a constraint such as uniform:0.5 or dense:fp32")
    return constrained_plan(text, workspace.layers, chosen, fingerprint)


def profile_of(workspace: Workspace, target: Target, folder: Path | None, progress: Progress) -> Profile:
    """A folder's profile, or one made now. Raises ProfileError where the folder's is for other targets."""
    if folder is None:
        return make_profile(workspace, [target], progress)
    found = load_profile(folder, workspace.checkpoint)
    if found.targets and target.name not in found.targets:
        raise ProfileError(
            f"{folder}: made for {', '.join(found.targets)}, not for {target.name}; run `edgec profile` again with "
            f"--target {target.name}"
        )
    return found


def planning_sizes(workspace: Workspace, kind: ArtifactKind, draft: Any, work: Path) -> Sizes:
    planned = {layer.name for layer in workspace.layers}
    trial = work / "companions"
    trial.mkdir(exist_ok=True)
    companions = kind.write_companions(workspace.checkpoint, draft, trial) + manifest_bytes(workspace)
    return Sizes(workspace.checkpoint.parameters, kind.other_bytes(draft, planned), companions)


def manifest_bytes(workspace: Workspace) -> int:
    """Room for edgec.json in a budget on the whole folder [bytes]; a layer's choice and hashes take about 600."""
    return 4096 + 1024 * len(workspace.layers)


def fit_drafts(
    workspace: Workspace, choices: Sequence[Choice], found: Profile, progress: Progress
) -> dict[str, Factors]:
    """Factors that a search compares plans by, on the activations of the dense model; the workspace remembers them."""
    return fit_choices(
        choices,
        workspace.weight,
        workspace.layers,
        found.statistics.moment,
        workspace.cache,
        partial(progress, "drafting"),
        quantizer=DRAFT,
    )


def fit(
    workspace: Workspace,
    choices: Sequence[Choice],
    moments: Callable[[str], SecondMoment | None],
    progress: Progress,
) -> dict[str, Factors]:
    """Factors as they ship, on the activations of the dense model; plainly where `moments` has none."""
    told = partial(progress, "fitting")
    return fit_choices(choices, workspace.weight, workspace.layers, moments, progress=told)
