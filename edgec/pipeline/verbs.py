"""The single stages as verbs: profile, plan, compress."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from edgec import outputs
from edgec.compress import store
from edgec.compress.streaming import compress_streamed
from edgec.errors import UnsupportedModelError
from edgec.export.onnx import exporter
from edgec.export.targets import all_targets, get_target
from edgec.pipeline.stages import (
    Goal,
    Progress,
    explicit_plan,
    fit,
    lossless,
    make_profile,
    planning_sizes,
    profile_of,
    search_plan,
    silent,
    statistics_for,
)
from edgec.plan import files as plan_files
from edgec.profile.store import Profile, load_profile, save_profile
from edgec.records import Plan
from edgec.workspace import CALIBRATION_TOKENS, Workspace, require_text

logger = logging.getLogger(__name__)


def profile(
    model: Path, out: Path | None, *, calibration: Path | None = None, force: bool = False, progress: Progress = silent
) -> Profile:
    """Measure every layer and score every candidate of every target; with `out`, save the folder."""
    if out is not None:
        outputs.check_free(out, force=force)
    workspace = Workspace(model, calibration)
    made = make_profile(workspace, list(all_targets().values()), progress)
    if out is not None:
        save_profile(made, out, force=force)
    return made


def plan(
    model: Path,
    target: str,
    goal: Goal,
    *,
    profile_folder: Path | None = None,
    calibration: Path | None = None,
    progress: Progress = silent,
) -> Plan:
    """The plan that `export` would make, without healing and exporting.

    Budgets on the whole file use an estimate of what else ships.
    """
    workspace = Workspace(model, calibration)
    chosen = get_target(target)
    exporter.refuse_unsupported(workspace.checkpoint, workspace.task)
    with tempfile.TemporaryDirectory(prefix="edgec-plan-") as folder:
        work = Path(folder)
        graph = exporter.dense_graph(workspace.checkpoint, workspace.task, work)
        sizes = planning_sizes(workspace, graph, work)
    found = profile_of(workspace, chosen, profile_folder, progress)
    return search_plan(workspace, found, chosen, goal, sizes, progress)


def compress(
    model: Path,
    out: Path,
    plan_text: str,
    *,
    target: str = "onnx-x64",
    profile_folder: Path | None = None,
    calibration: Path | None = None,
    plain: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> Plan:
    """Fit a plan (a YAML file or a constraint) and write the Compressed folder.

    One transformer block is in memory at a time, and each is fitted on the activations that the compressed blocks
    before it produce. With a profile folder, its statistics of the dense model are used instead, for the whole model
    at once.
    """
    outputs.check_free(out, force=force)
    workspace = Workspace(model, calibration)
    workspace.require_finite()
    made = explicit_plan(workspace, plan_text, target)
    if profile_folder is not None:
        return _compressed_whole(
            workspace, made, load_profile(profile_folder, workspace.checkpoint), out, force, progress
        )
    batches = None
    if not (plain or lossless(made)):
        require_text(workspace)
        batches = workspace.batches("calibrate", CALIBRATION_TOKENS)
        workspace.forget_model()
    try:
        compress_streamed(
            workspace.checkpoint,
            workspace.layers,
            made,
            batches,
            out,
            plan_text=plan_files.write_plan(made),
            force=force,
            progress=lambda done, total: progress("fitting", done, total),
        )
    except UnsupportedModelError as error:  # blocks that share their weights, for one
        logger.info("%s: compressed as a whole (%s)", workspace.folder, error)
        return _compressed_whole(
            workspace, made, statistics_for(workspace, made, None, plain, progress), out, force, progress
        )
    return made


def _compressed_whole(
    workspace: Workspace, made: Plan, found: Profile | None, out: Path, force: bool, progress: Progress
) -> Plan:
    factors = fit(workspace, made.choices, found, progress)
    store.save_compressed(workspace.checkpoint, made, factors, plan_files.write_plan(made), out, force=force)
    return made
