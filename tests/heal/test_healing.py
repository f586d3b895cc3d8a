"""Whole healing runs on tiny models: better or discarded, repeatable, resumable, recovered when they diverge."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgec import healing, modeling, pipeline
from edgec.errors import RuntimeUnavailableError, UsageError
from edgec.heal import trainer
from edgec.heal.cores import Student
from edgec.heal.settings import parse_heal
from edgec.heal.trainer import Curve, HealRun
from edgec.healing import Healed, Start, heal
from edgec.inspection import healing_curve_of
from edgec.pipeline.stages import explicit_plan, silent
from edgec.quantize.formats import QuantizedTensor
from edgec.workspace import Workspace


@pytest.fixture(scope="module", params=["encoder", "lm"])
def case(
    request: pytest.FixtureRequest, encoder_source: Path, lm_source: Path, text_file: Path
) -> tuple[Workspace, Start]:
    """A model at half of its parameters and 4 bits: much to heal."""
    workspace = Workspace(encoder_source if request.param == "encoder" else lm_source, text_file)
    made = explicit_plan(workspace, "uniform:0.5", "onnx-x64")
    return workspace, Start(pipeline.fit(workspace, made.choices, lambda name: None, silent))


def test_healing_brings_the_model_closer_and_repeats_itself(case: tuple[Workspace, Start]) -> None:
    workspace, start = case
    first = heal(workspace, start, parse_heal("20steps"))
    assert first.after < 0.9 * first.before, first.note
    assert first.curve is not None and first.curve.points[-1][1] == 20
    with workspace.substituted(first.factors, first.vectors) as model:
        assert workspace.divergence(model, workspace.search_batches) == pytest.approx(first.after, rel=1e-6)
    second = heal(workspace, start, parse_heal("20steps"))
    assert second.after == first.after
    for name, fitted in first.factors.items():
        assert np.array_equal(fitted.dense(), second.factors[name].dense()), name
    sizes = {name: fitted.stored_bytes for name, fitted in start.factors.items()}
    assert {name: fitted.stored_bytes for name, fitted in first.factors.items()} == sizes


def test_lora_heals_too(case: tuple[Workspace, Start]) -> None:
    workspace, start = case
    found = heal(workspace, start, parse_heal("12steps", method="lora"))
    assert found.after < found.before, found.note


def test_healing_that_does_not_help_is_discarded_and_says_so(
    case: tuple[Workspace, Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, start = case
    values = iter([1.0, 2.0])
    monkeypatch.setattr(healing, "_divergence", lambda *_: next(values))
    found = heal(workspace, start, parse_heal("2steps"))
    assert found.factors is start.factors and found.vectors is start.vectors
    assert "discarded" in found.note
    assert found.record()["kept"] is False


def test_auto_leaves_out_what_needs_no_healing(case: tuple[Workspace, Start], monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, start = case
    monkeypatch.setattr(healing, "_divergence", lambda *_: 1e-4)
    found = heal(workspace, start, parse_heal("auto"))
    assert found.curve is None and "auto leaves it out" in found.note


def test_a_device_that_is_not_there(case: tuple[Workspace, Start]) -> None:
    with pytest.raises(RuntimeUnavailableError, match="--device cpu"):
        heal(*case, parse_heal("2steps", device="privateuseone"))
    with pytest.raises(UsageError):
        parse_heal("2steps", method="none")


@pytest.fixture
def run(case: tuple[Workspace, Start]) -> Callable[..., tuple[HealRun, Student]]:
    workspace, start = case

    def make(text: str = "12steps", **changes: Any) -> tuple[HealRun, Student]:
        student = Student(modeling.load_dense(workspace.checkpoint), start.factors)
        made = HealRun(
            student,
            workspace.model,
            workspace.healing_batches.items,
            lambda model: workspace.divergence(model, workspace.judging_batches),
            parse_heal(text),
            workspace.pooling,
        )
        return replace(made, **changes), student

    return make


def test_an_interrupted_run_goes_on_where_it_stopped(run: Callable[..., Any], tmp_path: Path) -> None:
    """Killed after a check, resumed: the same numbers as a run that was never stopped."""
    whole, student = run()
    expected = whole.run()
    state = tmp_path / "state.safetensors"
    seen = 0

    class StoppedError(Exception):
        """Stands for SIGKILL."""

    def stop(done: int, total: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 8:
            raise StoppedError

    first, _ = run(state_file=state, key="k", progress=stop)
    with pytest.raises(StoppedError):
        first.run()
    assert state.is_file()
    second, resumed = run(state_file=state, key="k")
    curve: Curve = second.run()
    assert any("resumed" in note for note in curve.notes)
    assert [p[1:] for p in curve.points] == [p[1:] for p in expected.points]
    for name, fitted in student.factors().items():
        assert np.array_equal(fitted.dense(), resumed.factors()[name].dense()), name


@pytest.mark.parametrize("damage", [b"", b"\x00" * 64, None])
def test_a_foreign_or_damaged_state_is_not_used(
    run: Callable[..., Any], tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state.safetensors"
    first, _ = run("2steps", state_file=state, key="mine")
    first.run()
    if damage is not None:
        state.write_bytes(damage)
    second, _ = run("2steps", state_file=state, key="mine" if damage is not None else "another")
    curve = second.run()
    assert not any("resumed" in note for note in curve.notes)
    assert "starts anew" in caplog.text


def test_a_diverging_run_goes_back_and_loses_nothing(run: Callable[..., Any]) -> None:
    made, student = run("10steps", rate=3000.0)
    before = {name: fitted.dense() for name, fitted in student.factors().items()}
    curve = made.run()
    assert any("diverged" in note for note in curve.notes)
    assert curve.after <= curve.before
    if curve.steps == 0:
        assert all(np.array_equal(before[name], fitted.dense()) for name, fitted in student.factors().items())


def test_a_loss_that_is_not_a_number_changes_nothing(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(own: Any, wanted: Any, *_: Any) -> torch.Tensor:
        return own.hidden[-1].sum() * math.nan

    monkeypatch.setattr(trainer, "distillation_loss", broken)
    made, student = run("6steps")
    before = {name: fitted.dense() for name, fitted in student.factors().items()}
    curve = made.run()
    assert curve.after == curve.before and not curve.kept
    assert all(np.array_equal(before[name], fitted.dense()) for name, fitted in student.factors().items())


def test_a_run_is_resumed_by_the_same_one_only(case: tuple[Workspace, Start]) -> None:
    """However long it is to be; but not by one of another seed, method or start."""
    workspace, start = case
    key = healing._key(workspace, start, parse_heal("20steps"))
    assert key == healing._key(workspace, start, parse_heal("500steps"))
    others = [parse_heal("20steps", seed=1), parse_heal("20steps", method="lora"), parse_heal("5min")]
    assert all(healing._key(workspace, start, settings) != key for settings in others)
    name, fitted = next(iter(start.factors.items()))
    core, stored = next((c, s) for c, s in fitted.cores.items() if isinstance(s, QuantizedTensor))
    moved = replace(fitted, cores={**fitted.cores, core: replace(stored, scales=stored.scales * np.float16(2))})
    other = Start({**start.factors, name: moved}, start.vectors)
    assert healing._key(workspace, other, parse_heal("20steps")) != key


def test_a_check_that_was_no_number_is_told_as_json(case: tuple[Workspace, Start], tmp_path: Path) -> None:
    _, start = case
    curve = Curve(((0.0, 0, 0.5), (1.0, 3, math.nan), (2.0, 6, 0.4)), 0.5, 0.4, 6, True)
    found = Healed(start.factors, start.vectors, 0.5, 0.4, "a note", parse_heal("6steps"), curve)
    told = json.dumps({"kind": "artifact", "healing": found.record()}, allow_nan=False)
    (tmp_path / "edgec.json").write_text(told, encoding="utf-8")
    assert healing_curve_of(tmp_path) == ((0.0, 0, 0.5), (2.0, 6, 0.4))
