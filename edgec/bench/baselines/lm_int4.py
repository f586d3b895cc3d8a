"""The dense int4 decoder as onnxruntime-genai's builder writes it: block 32, symmetric, accuracy level 4.

The builder's own default is to share a tied head and embedding and to quantise both; that is kept.
"""

from __future__ import annotations

from pathlib import Path

from edgec.bench.baselines import CHECKPOINT, _genai_builder

PLUGIN = True
TASKS = ("causal-lm",)
NAME = "int4"
TOOL = "onnxruntime-genai model builder, int4 (block 32, accuracy level 4)"
SOURCE = CHECKPOINT


def build(source: Path, out: Path) -> None:
    _genai_builder.build(source, out, "int4", **_genai_builder.BLOCKS_OF_32)
