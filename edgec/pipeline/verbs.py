"""The single stages as verbs: profile, plan, compress."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edgec import outputs
from edgec.compress import store
from edgec.compress.streaming import compress_streamed
from edgec.errors import RuntimeUnavailableError, UnsupportedModelError, UsageError
from edgec.export.artifacts import kind_of
from edgec.export.targets import all_targets, get_target, offered
from edgec.modeling import DECODER_TASK
from edgec.pipeline.pace import paced
from edgec.pipeline.refit import fit_from_profile
from edgec.pipeline.stages import (
    Goal,
    Progress,
    calibration_batches,
    explicit_plan,
    fit_whole,
    make_profile,
    planning_sizes,
    profile_of,
    search_plan,
    silent,
)
from edgec.plan import files as plan_files
from edgec.profile.store import Profile, save_profile
from edgec.records import Plan, Target
from edgec.workspace import Workspace

logger = logging.getLogger(__name__)


def profile(
    model: Path,
    out: Path | None,
    *,
    targets: Sequence[str] = (),
    calibration: Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Profile:
    """Measure every layer and score every candidate of the targets, by default of all that can run the model here;
    with `out`, save the folder.
    """
    if out is not None:
        outputs.check_free(out, force=force)
    workspace = Workspace(model, calibration)
    chosen = [get_target(name) for name in targets]
    for target in chosen:
        kind_of(target).refuse_unsupported(workspace.checkpoint, workspace.task)
    made = make_profile(workspace, chosen or [t for t in all_targets().values() if _runs(t, workspace)], progress)
    if out is not None:
        save_profile(made, out, force=force)
    return made


def _runs(target: Target, workspace: Workspace) -> bool:
    try:
        kind_of(target).refuse_unsupported(workspace.checkpoint, workspace.task)
    except (UnsupportedModelError, RuntimeUnavailableError) as error:
        logger.info("not profiled for %s: %s", target.name, error)
        return False
    return True


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
    chosen = offered(get_target(target), encoder=workspace.task != DECODER_TASK)
    kind = kind_of(chosen)
    kind.refuse_unsupported(workspace.checkpoint, workspace.task)
    goal = paced(goal, chosen, workspace.task, progress)
    with tempfile.TemporaryDirectory(prefix="edgec-plan-") as folder:
        work = Path(folder)
        draft = kind.prepare(workspace.checkpoint, workspace.task, work)
        sizes = planning_sizes(workspace, kind, draft, work)
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
    before it produce. With a profile folder, the whole model is: its statistics tell what counts in factored tables,
    and its fit of the other layers ships where it is the closer one.
    """
    if plain and profile_folder is not None:
        raise UsageError("--plain fits without activations, of which --profile holds statistics; leave one of them out")
    outputs.check_free(out, force=force)
    workspace = Workspace(model, calibration)
    workspace.require_finite()
    made = explicit_plan(workspace, plan_text, target)
    text = plan_files.write_plan(made)
    if profile_folder is not None:
        factors, note = fit_from_profile(workspace, made, profile_folder, progress)
        logger.info("%s", note or "nothing to fit block by block")
    else:
        batches = calibration_batches(workspace, made, plain)
        try:
            compress_streamed(
                workspace.checkpoint,
                workspace.layers,
                made,
                batches,
                out,
                plan_text=text,
                force=force,
                progress=lambda done, total: progress("fitting", done, total),
            )
            return made
        except UnsupportedModelError as error:  # nothing is written yet
            logger.info("%s: not block by block (%s)", workspace.folder, error)
            factors = fit_whole(workspace, made, batches, progress)
    store.save_compressed(workspace.checkpoint, made, factors, text, out, force=force)
    return made
