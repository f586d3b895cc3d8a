"""Exports that heal: what ships is the healed model, within its budget, with the record of what was done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from models_for_tests import fit_only_once

from edgec import healing, pipeline
from edgec.errors import BudgetError, UsageError
from edgec.heal.settings import parse_heal
from edgec.pipeline.verified import shipped_loss
from edgec.plan.refine import Search
from edgec.runtime.ort_encoder import OrtEncoder
from edgec.workspace import Workspace

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _fitted_once() -> Iterator[None]:
    """A fit block by block leaves sixteen steps nothing to heal in random weights."""
    with pytest.MonkeyPatch.context() as patch:
        fit_only_once(patch)
        yield


@pytest.fixture(scope="module")
def request_(encoder_source: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.ExportRequest:
    folder = tmp_path_factory.mktemp("healed")
    pipeline.profile(encoder_source, folder / "profile", calibration=text_file)
    return pipeline.ExportRequest(
        encoder_source,
        "onnx-x64",
        folder / "out",
        budget="3bpw-linear",
        calibration=text_file,
        profile=folder / "profile",
        heal=parse_heal("16steps"),
        search=Search(evaluations=4),
    )


@pytest.fixture(scope="module")
def healed(request_: pipeline.ExportRequest) -> pipeline.Exported:
    return pipeline.export(request_)


def test_the_healed_model_ships_within_its_budget(healed: pipeline.Exported, request_: pipeline.ExportRequest) -> None:
    """Its biases and norms too: the exported graph agrees with torch on the healed ones, as verification measured."""
    record = healed.manifest["healing"]
    assert record["kept"] is True
    assert record["divergence_after"] < record["divergence_before"]
    assert record["curve"][0][1] == 0 and record["curve"][-1][1] > 0
    assert healed.plan.linear_bpw() <= 3
    assert any(note.startswith("healed: ") for note in healed.plan.notes)
    assert healed.manifest["parity"]["error"] < 1e-4
    workspace = Workspace(request_.model, request_.calibration)
    shipped = OrtEncoder(healed.out).embed(["A list of names.", "Objects are compared by their value."])
    assert shipped.shape == (2, 128)
    assert healed.manifest["fingerprint"] == workspace.checkpoint.fingerprint


def test_finalists_of_another_structure_are_healed_briefly_first(healed: pipeline.Exported) -> None:
    """At three bits the mix is neither all factored nor all dense: there is something to compare it with."""
    (told,) = (note for note in healed.plan.notes if "finalists, briefly healed" in note)
    assert told.count("→") >= 2


def test_auto_asks_no_finalists_where_there_is_nothing_to_heal(
    request_: pipeline.ExportRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing, "NOTHING_TO_HEAL", 2.0)
    found = pipeline.export(replace(request_, out=tmp_path / "auto", heal=parse_heal("auto")))
    assert found.manifest["healing"] == {"note": found.plan.notes[-1]}
    assert "auto leaves it out" in found.plan.notes[-1]
    assert not any("finalists" in note for note in found.plan.notes)


def test_the_same_steps_give_the_same_bytes(healed: pipeline.Exported, request_: pipeline.ExportRequest) -> None:
    again = pipeline.export(replace(request_, out=request_.out.with_name("again")))
    assert again.manifest["files"] == healed.manifest["files"]


def test_nothing_is_left_beside_the_output(healed: pipeline.Exported, request_: pipeline.ExportRequest) -> None:
    assert not [p for p in request_.out.parent.iterdir() if p.name.startswith(".")]


def test_healing_that_does_not_help_leaves_the_export_as_it_was(
    request_: pipeline.ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pipeline.export(replace(request_, out=request_.out.with_name("plain"), heal=parse_heal("off")))
    kept = healing._divergence
    seen: list[float] = []

    def never_better(workspace: Workspace, start: healing.Start) -> float:
        seen.append(kept(workspace, start))
        return float(len(seen))  # every later state is worse

    monkeypatch.setattr(healing, "_divergence", never_better)
    monkeypatch.setattr("edgec.pipeline.exporting._FINALISTS", 1)
    found = pipeline.export(replace(request_, out=request_.out.with_name("useless"), heal=parse_heal("2steps")))
    assert found.manifest["healing"]["kept"] is False
    assert any("discarded" in note for note in found.plan.notes)
    assert found.manifest["sizes"]["model_bytes"] == plain.manifest["sizes"]["model_bytes"]


def test_a_compressed_folder_has_nobody_to_learn_from(request_: pipeline.ExportRequest, tmp_path: Path) -> None:
    pipeline.compress(request_.model, tmp_path / "compressed", "uniform:0.5", plain=True)
    request = pipeline.ExportRequest(tmp_path / "compressed", "onnx-x64", tmp_path / "out", heal=parse_heal("2steps"))
    with pytest.raises(UsageError, match="leave --heal out"):
        pipeline.export(request)


def test_max_loss_in_place_of_a_budget(request_: pipeline.ExportRequest, tmp_path: Path) -> None:
    found = pipeline.export(
        replace(request_, out=tmp_path / "line", budget=None, max_loss="5%", heal=parse_heal("off"))
    )
    assert found.plan.budget == "max-loss 5%"
    assert found.manifest["quality"]["cosine"] > 0.9
    assert _lost(found) <= 0.05
    with pytest.raises(UsageError, match="give one of them"):
        pipeline.export(replace(request_, out=tmp_path / "both", max_loss="5%"))


def _lost(found: pipeline.Exported) -> float:
    (note,) = (note for note in found.plan.notes if note.startswith("the written files lose"))
    return float(note.rpartition(" ")[2])


def test_max_loss_holds_for_what_the_runtime_makes_of_the_files(
    request_: pipeline.ExportRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that loses 4 % by its rounding leaves 1 % of 5 % to the plan; one that loses all of it, or nearly all,
    leaves no plan.
    """
    request = replace(request_, out=tmp_path / "line", budget=None, max_loss="5%", heal=parse_heal("off"))
    loose = pipeline.export(request)
    lose = shipped_loss
    monkeypatch.setattr("edgec.pipeline.exporting.shipped_loss", lambda *told: lose(*told) + 0.04)
    found = pipeline.export(replace(request, out=tmp_path / "rounded"))
    assert _lost(found) <= 0.05 and found.plan.budget == "max-loss 5%"
    assert found.plan.bytes > loose.plan.bytes
    for rounding in (0.06, 0.04999):
        monkeypatch.setattr("edgec.pipeline.exporting.shipped_loss", lambda *told, r=rounding: lose(*told) + r)
        with pytest.raises(BudgetError, match=r"max-loss 5%: rounding in the runtime costs 0\.0\d+, and no plan"):
            pipeline.export(replace(request, out=tmp_path / "hopeless"))


def test_healed_files_that_miss_the_line_do_not_ship(
    request_: pipeline.ExportRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Healing is judged in floats: better there, and worse as the runtime computes."""
    told = iter([0.01, 0.9, 0.01])
    monkeypatch.setattr("edgec.pipeline.exporting.shipped_loss", lambda *_: next(told))
    found = pipeline.export(replace(request_, out=tmp_path / "line", budget=None, max_loss="5%"))
    assert found.manifest["healing"] == {} and _lost(found) == 0.01
