"""A real model: dense, edgec's ggml runtime is llama.cpp; factored, it says what torch says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

from edgec import modeling
from edgec.checkpoint import open_checkpoint
from edgec.compress import store
from edgec.export.artifacts import gguf, gguf_factored
from edgec.export.targets import get_target
from edgec.fit import Factors, fit
from edgec.plan.candidates import uniform
from edgec.quantize.formats import LayerFormat
from edgec.records import Spec
from edgec.runtime import RuntimeOptions, open_artifact
from edgec.runtime.ggml.model import GgmlModel
from runtime_tests.models import ASSETS

STORIES = ASSETS / "stories260K-hf"
BEGINNING = "Once upon a time, there was a little girl named Lily."

pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not there; set EDGEC_ASSETS")


def test_a_dense_file_is_llama_cpps(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(STORIES)
    draft = gguf.prepare(checkpoint, modeling.task_of(checkpoint), tmp_path)
    gguf.write(draft, {}, get_target("gguf"), tmp_path, lambda done, total: None)
    theirs: Any = open_artifact(tmp_path, RuntimeOptions(threads=1))
    ours = GgmlModel(tmp_path / "model.gguf", RuntimeOptions(threads=1))
    ids = np.array(ours.encode(BEGINNING))
    assert list(ids) == theirs.encode(BEGINNING)
    np.testing.assert_array_equal(ours.logits(ids), theirs.logits(ids))
    ends = [ids[0]]
    assert list(ours.forced(ends, 60)) == list(theirs.forced(ends, 60))
    assert "".join(piece.text for piece in ours.generate(ends, 60)).strip().startswith(BEGINNING[:30])


def test_a_factored_file_says_what_torch_says(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(STORIES)
    model: Any = modeling.load_dense(checkpoint)
    factors: dict[str, Factors] = {}
    for layer in modeling.layers(model):
        spec = Spec("dense") if layer.role == "embedding" else uniform(layer.shape, 0.9, 32)
        whole = layer.shape[1] % 32 == 0
        weight = model.get_submodule(layer.name).weight.numpy()
        factors[layer.name] = fit(weight, spec, LayerFormat.parse("int8-b32" if whole else "fp16"), role=layer.role)
    draft = gguf_factored.prepare(checkpoint, modeling.task_of(checkpoint), tmp_path)
    gguf_factored.write(draft, factors, get_target("gguf-factored"), tmp_path, lambda done, total: None)
    ours: Any = open_artifact(tmp_path, RuntimeOptions(threads=2))
    ids = np.array(ours.encode(BEGINNING))
    with torch.no_grad():
        expected = store.assemble(checkpoint, factors)(torch.from_numpy(ids)[None]).logits[0].numpy()
    assert np.linalg.norm(ours.logits(ids) - expected) < 0.02 * np.linalg.norm(expected)
