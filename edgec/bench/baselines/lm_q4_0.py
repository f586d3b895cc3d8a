"""llama.cpp's plainest four bits, and its fastest: Q4_0 is repacked for AVX2, AVX-512 and dot products."""

from __future__ import annotations

from pathlib import Path

from edgec.bench.baselines import DENSE_GGUF, _llama_quantize

PLUGIN = True
TASKS = ("causal-lm",)
NAME = "q4_0"
TOOL = _llama_quantize.tool("Q4_0")
SOURCE = DENSE_GGUF

missing = _llama_quantize.missing
notes = _llama_quantize.notes


def build(source: Path, out: Path) -> None:
    _llama_quantize.build(source, out, "Q4_0")
