"""The same in float16: what a GPU is given by default. Processors without fp16 arithmetic are slow at it."""

from __future__ import annotations

from pathlib import Path

from edgec.bench.baselines import CHECKPOINT, _torch_peer

PLUGIN = True
TASKS = ("encoder", "causal-lm")
NAME = "torch-eager-fp16"
TOOL = "torch, eager, fp16"
SOURCE = CHECKPOINT


def build(source: Path, out: Path) -> None:
    _torch_peer.build(source, out, compiled=False, dtype="float16")
