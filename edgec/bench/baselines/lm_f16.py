"""Half precision in llama.cpp: what a checkpoint is before anybody compresses it."""

from __future__ import annotations

from pathlib import Path

from edgec.bench.baselines import DENSE_GGUF, _llama_quantize

PLUGIN = True
TASKS = ("causal-lm",)
NAME = "f16"
TOOL = "llama.cpp, F16, from edgec's F16 GGUF"
SOURCE = DENSE_GGUF

missing = _llama_quantize.missing
notes = _llama_quantize.notes


def build(source: Path, out: Path) -> None:
    _llama_quantize.build(source, out, "F16")
