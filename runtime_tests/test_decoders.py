"""Every family of causal LMs through the whole pipeline into onnxruntime-genai, and one real model word for word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoder_cases import FAMILIES, make_model, save, scaled_config, torch_greedy
from numpy.typing import NDArray

import edgec
from edgec import pipeline
from edgec.export.verify import float_activations
from edgec.plan.files import write_plan
from edgec.plan.planner import make_choice
from edgec.quantize.formats import CoreFormat
from edgec.records import Plan, Spec
from edgec.runtime import CausalLM, open_artifact
from edgec.runtime.ort_decoder import OrtDecoder
from edgec.workspace import Workspace

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball."
)
NEW_TOKENS = 160


def _open(folder: Path) -> CausalLM:
    loaded: Any = open_artifact(folder)
    assert loaded.runtime == "onnxruntime-genai"
    return loaded


def _logits(model: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_factored_int4_family_loads_generates_and_agrees(family: str, tmp_path: Path) -> None:
    """Against the torch model of the compressed folder, which shares no code with the graph but the stored numbers."""
    source = save(tmp_path / "source", make_model(scaled_config(family)))
    plan = "uniform:0.5:int4-b32"
    request = pipeline.ExportRequest(source, "onnx-x64", tmp_path / "out", plan=plan, plain=True, quality=False)
    done = pipeline.export(request)
    kinds = {choice.spec.kind for choice in done.plan.choices if choice.role == "linear"}
    assert kinds >= {"svd"}, "nothing was factored"
    assert {choice.format for choice in done.plan.choices if choice.role == "linear"} == {"int4-b32"}

    loaded = _open(done.out)
    prompt = [1, 40, 77, 105]
    pieces = [piece.token for piece in loaded.generate(prompt, 12)]
    assert len(pieces) == 12 or pieces == []  # random weights may say end of text at once
    forced = list(loaded.forced(prompt, 12))
    assert len(forced) == 12
    assert pieces == forced[: len(pieces)]  # random weights may say end of text, which `forced` suppresses

    pipeline.compress(source, tmp_path / "compressed", plan, plain=True)
    model = edgec.load(tmp_path / "compressed")
    ids = np.random.default_rng(0).integers(3, loaded.vocab_size, 48)
    with float_activations(done.out) as plain:
        assert _relative(OrtDecoder(plain).logits(ids), _logits(model, ids)) < 1e-3
    assert _relative(loaded.logits(ids), _logits(model, ids)) < 0.3  # int8 activations; a wiring error gives above 1


def _relative(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    assert np.isfinite(actual).all()
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("form", ["dense:fp32", "every linear as svd at full rank"])
def test_stories260k_tells_its_story_token_for_token(stories: Path, form: str, tmp_path: Path) -> None:
    plan = form if form == "dense:fp32" else str(_full_rank_plan(stories, tmp_path / "plan.yaml"))
    request = pipeline.ExportRequest(stories, "onnx-x64", tmp_path / "out", plan=plan, plain=True, quality=False)
    done = pipeline.export(request)
    if form != "dense:fp32":
        linears = [choice for choice in done.plan.choices if choice.role == "linear"]
        assert len(linears) == 35
        assert all(choice.spec == Spec("svd", (min(choice.shape),)) for choice in linears)
    loaded = _open(done.out)
    expected = torch_greedy(Workspace(stories).model, [1], NEW_TOKENS)
    assert list(loaded.forced([1], NEW_TOKENS)) == expected
    told = list(loaded.generate([1], NEW_TOKENS))
    assert [piece.token for piece in told] == expected[: len(told)]
    assert len(told) >= 100
    assert "".join(piece.text for piece in told).strip().startswith(STORY)


def _full_rank_plan(source: Path, path: Path) -> Path:
    """Every linear as the product of two factors at full rank; head and table dense."""
    workspace = Workspace(source)
    choices = [
        make_choice(
            layer,
            Spec("svd", (min(layer.shape),)) if layer.role == "linear" else Spec("dense"),
            CoreFormat.parse("fp32"),
        )
        for layer in workspace.layers
    ]
    plan = Plan(workspace.checkpoint.fingerprint, "onnx-x64", "full rank", tuple(choices))
    path.write_text(write_plan(plan), encoding="utf-8")
    return path
