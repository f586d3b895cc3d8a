"""The four bits that llama.cpp recommends: K types, more bits where they matter."""

from __future__ import annotations

from pathlib import Path

from edgec.bench.baselines import DENSE_GGUF, _llama_quantize

PLUGIN = True
TASKS = ("causal-lm",)
NAME = "q4_k_m"
TOOL = _llama_quantize.tool("Q4_K_M")
SOURCE = DENSE_GGUF

missing = _llama_quantize.missing
notes = _llama_quantize.notes


def build(source: Path, out: Path) -> None:
    _llama_quantize.build(source, out, "Q4_K_M")
