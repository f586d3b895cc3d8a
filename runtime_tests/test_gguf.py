"""A real model in llama.cpp: the text that it is known for, and quality after every kind of type."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from edgec import modeling, pipeline
from edgec.checkpoint import open_checkpoint
from edgec.heal.settings import HealSettings
from edgec.runtime import open_artifact
from edgec.runtime.llama_cpp import LlamaCpp

pytest.importorskip("llama_cpp", reason="needs the extra edgec[gguf]")

ASSETS = Path(os.environ.get("EDGEC_ASSETS", Path(__file__).parents[1] / "../shared/assets"))
SOURCE = ASSETS / "stories260K-hf"
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw"


@pytest.mark.skipif(not SOURCE.is_dir(), reason="EDGEC_ASSETS has no stories260K-hf")
@pytest.mark.parametrize(("plan", "tolerance"), [("dense:fp32", 1e-3), ("dense:int8-b32", 0.02)])
def test_the_story_of_lily(plan: str, tolerance: float, tmp_path: Path) -> None:
    request = pipeline.ExportRequest(
        SOURCE, "gguf", tmp_path / "out", plan=plan, plain=True, quality=False, heal=HealSettings(mode="off")
    )
    made = pipeline.export(request)
    loaded = open_artifact(made.out)
    assert isinstance(loaded, LlamaCpp)
    start = "Once upon a time"
    assert (start + "".join(piece.text for piece in loaded.generate(start, 60))).startswith(STORY)
    ids = np.array(loaded.encode(STORY))
    with torch.no_grad():
        expected = modeling.load_dense(open_checkpoint(SOURCE))(torch.from_numpy(ids)[None]).logits[0].numpy()
    assert np.linalg.norm(loaded.logits(ids) - expected) < tolerance * np.linalg.norm(expected)
