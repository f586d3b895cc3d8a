"""Eight bits in llama.cpp: what is nearly free of loss there."""

from __future__ import annotations

from pathlib import Path

from edgec.bench.baselines import DENSE_GGUF, _llama_quantize

PLUGIN = True
TASKS = ("causal-lm",)
NAME = "q8_0"
TOOL = _llama_quantize.tool("Q8_0")
SOURCE = DENSE_GGUF

missing = _llama_quantize.missing
notes = _llama_quantize.notes


def build(source: Path, out: Path) -> None:
    _llama_quantize.build(source, out, "Q8_0")
