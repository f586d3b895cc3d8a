"""The dense fp32 decoder as onnxruntime-genai's builder writes it."""

from __future__ import annotations

from pathlib import Path

from edgec.bench.baselines import CHECKPOINT, _genai_builder

PLUGIN = True
TASKS = ("causal-lm",)
NAME = "fp32"
TOOL = "onnxruntime-genai model builder, fp32"
SOURCE = CHECKPOINT


def build(source: Path, out: Path) -> None:
    _genai_builder.build(source, out, "fp32")
