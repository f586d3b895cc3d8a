"""Exports that begin with a compressed folder: as it is where the target runs its forms, else reconstructed."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from edgec import modeling
from edgec.compress import store
from edgec.errors import PlanError
from edgec.export.artifacts import kind_of
from edgec.fit import Factors
from edgec.plan.planner import check_plan
from edgec.records import Plan, Target
from edgec.workspace import Workspace

logger = logging.getLogger(__name__)


def ships_as_it_is(folder: Path, target: Target) -> bool:
    """Can the target run every stored layer of a compressed folder, so that no number changes?"""
    opened = store.open_compressed(folder)
    layers = modeling.layers(modeling.without_memory(opened.checkpoint))
    try:
        check_plan(replace(opened.plan, fingerprint=""), layers, target, "")
    except PlanError:
        return False
    return True


def reconstructed_folder(model: Path, target: Target, work: Path) -> Path:
    """A compressed folder as the dense checkpoint that it stands for, to be quantised anew: for runtimes that have no
    factored layers.
    """
    opened = store.open_compressed(model)
    opened.checkpoint.check_finite()
    logger.warning(
        "%s: %s has no factored layers; they are reconstructed and quantised anew, and quality is measured against "
        "the reconstruction (`edgec eval --model DENSE` compares with the original)",
        model,
        target.name,
    )
    return store.densify(opened, work / "dense").folder


def from_compressed(
    model: Path, out: Path, calibration: Path | None, target: Target, work: Path
) -> tuple[Workspace, Plan, dict[str, Factors]]:
    """A compressed folder as a workspace over its densified weights, its plan, its factors as they were stored."""
    opened = store.open_compressed(model)
    kind_of(target).refuse_unsupported(opened.checkpoint, modeling.task_of(opened.checkpoint))
    opened.checkpoint.check_finite()
    checkpoint = store.densify(opened, work / "dense")
    workspace = Workspace(checkpoint.folder, calibration)
    check_plan(replace(opened.plan, fingerprint=""), workspace.layers, target, "")
    note = f"exported from a compressed folder: `edgec eval {out.name} --model DENSE` measures its quality"
    return workspace, replace(opened.plan, notes=(*opened.plan.notes, note)), store.read_factors(opened)
