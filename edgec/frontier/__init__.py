"""The frontier: quality against size, edgec's plans beside every rival, on one model, in one run.

Ordered here, above `pipeline`, because it needs plans, peers, evaluation and a report at once. Every contestant
replaces the same block linears, keeps embeddings and head at int8 and is measured by the same torch code on the same
text, so that a difference between two rows is a difference between two methods. Measuring exported artifacts instead
was turned down: most peers have no exporter here, and the exports' parity is verified where they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgec import healing, outputs, peers, pipeline
from edgec.errors import UsageError
from edgec.export.targets import get_target
from edgec.fit import Factors
from edgec.frontier.judge import EVALUATION_TOKENS, Judge
from edgec.frontier.planning import Planned, Planner, pipeline_planner
from edgec.frontier.race import SLACK, Heal, Race, Vectors
from edgec.heal.settings import HealSettings
from edgec.pipeline import Progress
from edgec.plan.budget import parse_budget
from edgec.plan.refine import Search
from edgec.profile.store import Profile
from edgec.records import Target
from edgec.report import frontier_page, frontier_tables
from edgec.report.frontier_records import Frontier
from edgec.workspace import Workspace

BITS = (5.0, 4.0, 3.0, 2.5, 2.0)
"""Budgets that are tried by default [bits per weight of the block linears]."""

MIN_BITS, MAX_BITS = 0.1, 32.0
"""What a budget may be [bits per weight]."""


@dataclass(frozen=True)
class FrontierRequest:
    """What `edgec frontier` was asked for. bits: budgets on block linears. sts: an STS-Benchmark file (encoders).
    eval_text: held-out text; without it, the validation split of the calibration text. peers: names of `edgec.peers`.
    heal: how long edgec's plans and the best rivals are healed, each alike; "auto" is not a time that all could have.
    profile: a folder made by `edgec profile` on the same calibration text.
    """

    model: Path
    target: str = "onnx-x64"
    bits: tuple[float, ...] = BITS
    calibration: Path | None = None
    sts: Path | None = None
    eval_text: Path | None = None
    peers: tuple[str, ...] = field(default_factory=peers.families)
    heal: HealSettings = field(default_factory=HealSettings)
    profile: Path | None = None
    search: Search = field(default_factory=Search)
    eval_tokens: int = EVALUATION_TOKENS


def parse_bits(text: str) -> tuple[float, ...]:
    """"4,2.5" → (4.0, 2.5). Raises UsageError."""
    try:
        found = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = ()
    if not found or not all(MIN_BITS <= bits <= MAX_BITS for bits in found):
        raise UsageError(f"--bits {text!r}: expected numbers from {MIN_BITS:g} to {MAX_BITS:g}, for example 4,3,2.5")
    return found


def run_and_write(
    request: FrontierRequest,
    out: Path,
    progress: Progress,
    *,
    force: bool = False,
) -> Frontier:
    """Everything: the folder with frontier.json, .md, .svg and .html, whole or not at all."""
    outputs.check_free(out, force=force)
    found = run(request, progress)
    with outputs.staged_folder(out, force=force) as stage:
        (stage / "frontier.json").write_text(frontier_tables.to_json(found), encoding="utf-8")
        (stage / "frontier.md").write_text(frontier_tables.to_markdown(found), encoding="utf-8")
        (stage / "frontier.svg").write_text(frontier_page.standalone_svg(found), encoding="utf-8")
        (stage / "frontier.html").write_text(frontier_page.page(found), encoding="utf-8")
    return found


def run(
    request: FrontierRequest,
    progress: Progress,
    *,
    planner: Callable[[Workspace, Target, Profile], Planner] | None = None,
) -> Frontier:
    """Plan every budget, fit every peer, measure all of them, compare. planner: default, edgec's own pipeline."""
    budgets = _checked(request)
    target = get_target(request.target)
    workspace = Workspace(request.model, request.calibration)
    judge = Judge(  # refuses a wrong evaluation file before minutes of work
        workspace, sts=request.sts, eval_text=request.eval_text, tokens=request.eval_tokens
    )
    found = pipeline.profile_of(workspace, target, request.profile, progress)
    race = Race(workspace, target, found, judge, progress)
    plan = planner(workspace, target, found) if planner else pipeline_planner(
        workspace, target, found, request.search, progress
    )
    race.edgec(plan, budgets)
    race.peers(request.peers, request.bits)
    if request.heal.mode != "off":
        race.heal(_healer(workspace, request.heal, progress))
    return Frontier(
        model=workspace.folder.resolve().name,
        target=target.name,
        metric=judge.metric,
        calibration=f"{found.calibration}, {found.tokens} tokens",
        evaluated_on=judge.text,
        heal=str(request.heal),
        slack=SLACK,
        dense=judge.dense_figures,
        points=race.points,
        verdicts=race.verdicts(),
        skipped=tuple(race.skipped),
    )


def _healer(workspace: Workspace, settings: HealSettings, progress: Progress) -> Heal:
    def heal(factors: Mapping[str, Factors]) -> tuple[Mapping[str, Factors], Vectors]:
        found = healing.heal(
            workspace,
            healing.Start(factors),
            settings,
            progress=lambda done, total: progress("healing one", done, total),
        )
        return found.factors, found.vectors

    return heal


def _checked(request: FrontierRequest) -> dict[float, str]:
    """Budget → its text, largest first. Raises UsageError."""
    if not request.bits:
        raise UsageError("--bits: give at least one number of bits per weight, for example 4,3,2")
    if request.heal.mode == "auto":
        raise UsageError("--heal auto: a comparison heals all contestants alike; give a time, such as 2min, or off")
    budgets = {bits: f"{bits:g}bpw-linear" for bits in sorted(set(request.bits), reverse=True)}
    for text in budgets.values():
        parse_budget(text)
    return budgets


__all__ = ["BITS", "FrontierRequest", "Heal", "Planned", "Planner", "parse_bits", "run", "run_and_write"]
