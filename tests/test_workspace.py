"""What the stages share of one checkpoint: text in rows that the model can take."""

from __future__ import annotations

from pathlib import Path

import pytest
from models_for_tests import write_causal_lm, write_encoder, write_text

from edgec import modeling
from edgec.workspace import Workspace


@pytest.mark.parametrize("write", [write_encoder, write_causal_lm])
def test_rows_of_text_fit_the_models_positions(write: object, tmp_path: Path) -> None:
    """A model with fewer positions than the usual row has tokens used to crash on its first batch."""
    assert callable(write)
    workspace = Workspace(write(tmp_path / "model", max_position_embeddings=24), write_text(tmp_path / "text.txt"))
    batches = workspace.batches("calibrate", 4096)
    assert max(batch["input_ids"].shape[1] for batch in batches.items) == 24 == workspace.context
    assert workspace.random_batches.items[0]["input_ids"].shape[1] == 24
    modeling.load_dense(workspace.checkpoint)(**batches.items[-1])
