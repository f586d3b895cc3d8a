"""transformers on torch as it comes, fp32."""

from __future__ import annotations

from pathlib import Path

from edgec.bench.baselines import CHECKPOINT, _torch_peer

PLUGIN = True
TASKS = ("encoder", "causal-lm")
NAME = "torch-eager"
TOOL = "torch, eager, fp32"
SOURCE = CHECKPOINT


def build(source: Path, out: Path) -> None:
    _torch_peer.build(source, out, compiled=False, dtype="float32")
