"""The dense int4 decoder with a head that computes the last position only, as the builder makes it when asked to.

The builder's default computes every position's logits, and edgec's graphs do not, so this is the peer for prompts and
memory. It costs who evaluates it: its logits are had token by token.
"""

from __future__ import annotations

from pathlib import Path

from edgec.bench.baselines import CHECKPOINT, _genai_builder

PLUGIN = True
TASKS = ("causal-lm",)
NAME = "int4-pruned"
TOOL = "onnxruntime-genai model builder, int4 (block 32, accuracy level 4, pruned head)"
SOURCE = CHECKPOINT


def build(source: Path, out: Path) -> None:
    _genai_builder.build(source, out, "int4", **_genai_builder.BLOCKS_OF_32, prune_lm_head="true")
