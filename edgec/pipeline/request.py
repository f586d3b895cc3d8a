"""What `edgec export` is asked for, and what of it can be refused before any work."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from edgec.errors import UsageError
from edgec.export.targets import get_target, parse_arithmetic
from edgec.heal.settings import HealSettings
from edgec.modeling import DECODER_TASK
from edgec.pipeline.stages import Goal
from edgec.plan.acceptance import parse_max_loss
from edgec.plan.budget import parse_budget, parse_time
from edgec.plan.refine import Search
from edgec.records import Target
from edgec.workspace import Workspace


@dataclass(frozen=True)
class ExportRequest:
    """What `edgec export` was asked for. plan: a YAML file or a constraint; profile: a folder made by `edgec profile`;
    plain: fit a given plan without activations (no calibration run; for speed tests). quality: measure the result
    on held-out text; off only for random weights, whose quality means nothing. max_loss: a line ("1%") in place of a
    budget. max_latency: most time of the planned layers ("5ms"). arithmetic: of an ONNX encoder, in place of the
    target's own.
    """

    model: Path
    target: str
    out: Path
    budget: str | None = None
    plan: str | None = None
    calibration: Path | None = None
    profile: Path | None = None
    max_loss: str | None = None
    max_latency: str | None = None
    heal: HealSettings = field(default_factory=HealSettings)
    search: Search = field(default_factory=Search)
    plain: bool = False
    quality: bool = True
    force: bool = False
    arithmetic: str | None = None


def target_of(request: ExportRequest) -> Target:
    """The target, multiplying as the request says. Raises UsageError where it has no say in that."""
    target = get_target(request.target)
    if request.arithmetic is None:
        return target
    arithmetic = parse_arithmetic(request.arithmetic)
    if target.artifact != "onnx":
        raise UsageError(f"--arithmetic is for ONNX encoders; {target.name} writes {target.artifact} files")
    return replace(target, encoder_arithmetic=arithmetic)


def refuse_int8(request: ExportRequest, workspace: Workspace) -> None:
    """Raises UsageError for int8 products of a decoder."""
    if request.arithmetic == "int8" and workspace.task == DECODER_TASK:
        raise UsageError("--arithmetic int8 is for encoders; a decoder multiplies one row, as packed weights want")


def goal_of(request: ExportRequest, target: Target) -> Goal:
    """What is planned for; by default the target's own budget. Raises UsageError for limits that contradict."""
    if request.plain and (not request.plan or request.profile):
        raise UsageError(
            "--plain fits a given --plan of a dense model without activations; give one, and leave --profile out"
        )
    if request.plan and (request.budget or request.max_loss):
        raise UsageError(
            "--plan already decides every layer; leave --budget and --max-loss out, or make a plan that fits with "
            "`edgec plan --budget`"
        )
    if request.plan and request.max_latency:
        raise UsageError("--plan already decides every layer; leave --max-latency out")
    max_ms = parse_time(request.max_latency, "--max-latency") if request.max_latency else None
    if request.max_loss:
        if request.budget:
            raise UsageError("--budget limits the size and --max-loss the loss; give one of them")
        return Goal(line=parse_max_loss(request.max_loss), search=request.search, max_ms=max_ms)
    return Goal(parse_budget(request.budget or target.default_budget), search=request.search, max_ms=max_ms)
