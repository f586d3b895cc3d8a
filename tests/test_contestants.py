"""Who may stand beside whom, said before anything is built; the rest of it is measured in runtime_tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models_for_tests import write_causal_lm, write_encoder

from edgec import contestants
from edgec.bench.baselines import _llama_quantize
from edgec.contestants import ShapeRequest, baseline_names, of_shape, peers, smaller
from edgec.errors import RuntimeUnavailableError, UsageError
from edgec.workspace import Workspace


def silent(stage: str, done: int, total: int) -> None:
    return None


@pytest.fixture
def nothing_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A folder to work in that must stay empty."""
    work = tmp_path / "work"
    work.mkdir()
    yield work
    assert list(work.iterdir()) == []


def test_every_task_has_its_baselines() -> None:
    assert {"fp32", "int4", "int8", "torch-compile", "torch-eager"} <= set(baseline_names("encoder"))
    assert {"fp32", "int4", "q4_0", "q4_k_m", "q8_0", "torch-eager"} <= set(baseline_names("causal-lm"))
    assert "q4_0" not in baseline_names("encoder")


def test_unknown_and_unavailable_baselines_are_refused_first(
    lm_source: Path, nothing_is_made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(lm_source)
    with pytest.raises(UsageError, match=r"'q5_7'; known for this model: .*q4_0"):
        peers(workspace, ["int4", "q5_7"], nothing_is_made, silent)

    def absent() -> Any:
        raise RuntimeUnavailableError("llama-cpp-python cannot be imported; pip install 'edgec[gguf]'")

    monkeypatch.setattr(_llama_quantize, "import_llama_cpp", absent)
    with pytest.raises(RuntimeUnavailableError, match=r"baseline q8_0 \(llama.cpp.*pip install 'edgec\[gguf\]'"):
        peers(workspace, ["int4", "q8_0"], nothing_is_made, silent)


def test_a_smaller_model_does_the_same_and_is_smaller(lm_source: Path, nothing_is_made: Path, tmp_path: Path) -> None:
    larger = write_causal_lm(tmp_path / "larger", num_hidden_layers=3)
    with pytest.raises(UsageError, match=r"larger has .* parameters, and .* has"):
        smaller(Workspace(lm_source), larger, "", nothing_is_made, silent)
    encoder = write_encoder(tmp_path / "encoder", num_hidden_layers=1)
    with pytest.raises(UsageError, match=r"encoder does feature-extraction, .* does text-generation"):
        smaller(Workspace(lm_source), encoder, "", nothing_is_made, silent)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (ShapeRequest("llama-9000b"), r"unknown shape"),
        (ShapeRequest("llama-tiny", targets=("gguf",)), r"--shape exports to an ONNX target or to gguf-factored"),
        (ShapeRequest("llama-tiny", targets=("onnx-none",)), r"unknown target|onnx-none"),
        (ShapeRequest("llama-tiny", peers=("int3",)), r"unknown baseline 'int3'"),
    ],
)
def test_what_no_shape_can_be_is_refused_first(request_: ShapeRequest, why: str, nothing_is_made: Path) -> None:
    with pytest.raises(UsageError, match=why):
        of_shape(request_, nothing_is_made, silent)


def test_names_of_models_cannot_leave_the_folder_of_work() -> None:
    assert contestants._slug("smaller ../../etc/x y") == "smaller-..-..-etc-x-y"
