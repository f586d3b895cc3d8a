"""A checkpoint as llama.cpp's own converter would write it, matrices in F16 and vectors in F32: for its tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgec.checkpoint import Checkpoint
from edgec.export.gguf import stock
from edgec.export.gguf.writer import write_gguf
from edgec.outputs import staged_folder
from edgec.runtime.llama_cpp import MODEL_FILE


def write_plain(checkpoint: Checkpoint, out: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """The folder `out` with its model.gguf, which appears whole or not at all. Raises UnsupportedModelError."""
    draft = stock.draft(checkpoint)
    with staged_folder(out) as stage:
        write_gguf(stage / MODEL_FILE, draft.metadata, stock.tensors(draft, {}), progress)
    return out
