"""The dense int8 decoder as onnxruntime-genai's builder writes it: what `int4` is, at eight bits."""

from __future__ import annotations

from pathlib import Path

from edgec.bench.baselines import CHECKPOINT, _genai_builder

PLUGIN = True
TASKS = ("causal-lm",)
NAME = "int8"
TOOL = "onnxruntime-genai model builder, int8 (block 32, accuracy level 4)"
SOURCE = CHECKPOINT


def build(source: Path, out: Path) -> None:
    _genai_builder.build(source, out, "int8", **_genai_builder.BLOCKS_OF_32)
