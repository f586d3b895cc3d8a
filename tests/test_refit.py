"""A plan's factors, fitted once more block by block: kept where they are closer to the dense model, and only there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models_for_tests import fit_only_once

from edgec import pipeline
from edgec.errors import NumericsError
from edgec.export.targets import get_target
from edgec.fit import Factors
from edgec.heal.settings import parse_heal
from edgec.pipeline import refit, stages
from edgec.pipeline.stages import fit, fit_drafts, silent
from edgec.plan.planner import constrained_plan
from edgec.plan.refine import Search
from edgec.profile.activations import Statistics, collect
from edgec.profile.store import Profile
from edgec.records import Plan
from edgec.workspace import Workspace


def started(folder: Path, text: Path, plan: str) -> tuple[Workspace, Plan, Statistics, dict[str, Factors]]:
    """A plan and its drafts on the dense model's activations."""
    workspace = Workspace(folder, text)
    made = constrained_plan(plan, workspace.layers, get_target("onnx-x64"), workspace.checkpoint.fingerprint)
    found = collect(workspace.model, workspace.layers, workspace.calibration_batches, pooling=workspace.pooling)
    whole = Profile(workspace.checkpoint.fingerprint, "", found.tokens, (), found)
    return workspace, made, found, fit_drafts(workspace, made.choices, whole, silent)


def divergence(workspace: Workspace, factors: Mapping[str, Factors]) -> float:
    with workspace.substituted(factors) as model:
        return workspace.divergence(model, workspace.second_batches)


@pytest.mark.parametrize("source", ["encoder_source", "lm_source"])
@pytest.mark.parametrize("plan", ["uniform:0.5:int4-b32", "dense:int4-b32"])
def test_fitted_block_by_block_is_closer(
    source: str, plan: str, text_file: Path, request: pytest.FixtureRequest
) -> None:
    """On text that took part in nothing, with the same bytes."""
    workspace, made, found, drafts = started(request.getfixturevalue(source), text_file, plan)
    told: list[str] = []

    def tell(stage: str, done: int, total: int) -> None:
        told.append(stage)

    again, note = refit.refitted(workspace, made.choices, drafts, found.moment, tell)
    assert note.startswith("fitted block by block: divergence") and set(told) == {"fitting block by block"}
    assert list(again) == list(drafts)
    for choice in made.choices:
        assert again[choice.layer].stored_bytes == drafts[choice.layer].stored_bytes
    assert divergence(workspace, again) < 0.9 * divergence(workspace, drafts)


@pytest.mark.parametrize("by_blocks", [True, False])
def test_tables_are_fitted_on_what_gradients_say(
    by_blocks: bool, encoder_source: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alike whether the model runs block by block or not; and no longer as drafts."""
    workspace, made, found, drafts = started(encoder_source, text_file, "dense:int4-b32")
    expected = fit(workspace, made.choices, found.moment, silent)
    if not by_blocks:
        monkeypatch.setattr(stages, "stream_fit", overflows)
    again, _ = refit.refitted(workspace, made.choices, drafts, found.moment, silent)
    tables = [c.layer for c in made.choices if c.role == "embedding"]
    assert tables
    for name in tables:
        np.testing.assert_array_equal(again[name].dense(), expected[name].dense())
    word = tables[0]
    assert not np.array_equal(again[word].dense(), drafts[word].dense())


def test_what_does_not_help_is_discarded(
    encoder_source: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, made, found, drafts = started(encoder_source, text_file, "dense:int4-b32")

    def spoilt(*arguments: Any, **options: Any) -> Any:
        last = made.choices[-1]
        zeros = Factors(drafts[last.layer].contraction, {"weight": np.zeros(last.shape, np.float32)})
        yield {**drafts, last.layer: zeros}

    monkeypatch.setattr(stages, "stream_fit", spoilt)
    kept, note = refit.refitted(workspace, made.choices, drafts, found.moment, silent)
    assert kept is drafts and "did not help and is discarded" in note


def overflows(*arguments: Any, **options: Any) -> Any:
    raise NumericsError("block 'encoder.layer.1' is not finite on the calibration text")
    yield


def test_floats_have_nothing_to_gain(encoder_source: Path, text_file: Path) -> None:
    workspace, made, found, drafts = started(encoder_source, text_file, "dense:fp32")
    assert refit.refitted(workspace, made.choices, drafts, found.moment, silent) == (drafts, "")


def test_what_does_not_run_block_by_block_is_fitted_on_the_dense_model(
    encoder_source: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that share their weights, and a stream that overflows, are no failure."""
    workspace, made, found, _ = started(encoder_source, text_file, "dense:int2-b64")
    drafts = fit(workspace, made.choices, lambda name: None, silent)
    monkeypatch.setattr(stages, "stream_fit", overflows)
    again, note = refit.refitted(workspace, made.choices, drafts, found.moment, silent)
    assert note.startswith("fitted on the dense model's activations: divergence")
    assert divergence(workspace, again) < 0.8 * divergence(workspace, drafts)


@pytest.mark.slow
def test_a_line_is_met_with_fewer_bytes(
    encoder_source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.profile(encoder_source, tmp_path / "profile", calibration=text_file)
    request = pipeline.ExportRequest(
        encoder_source,
        "onnx-arm64",
        tmp_path / "again",
        max_loss="0.5%",
        calibration=text_file,
        profile=tmp_path / "profile",
        heal=parse_heal("off"),
        search=Search(evaluations=6),
    )
    found = pipeline.export(request)
    (note,) = (note for note in found.plan.notes if "of the bytes loses" in note)
    assert float(note.rpartition(" ")[2]) <= 0.005 and found.plan.budget == "max-loss 0.5%"
    fit_only_once(monkeypatch)
    once = pipeline.export(replace(request, out=tmp_path / "once"))
    assert found.plan.bytes < 0.98 * once.plan.bytes
