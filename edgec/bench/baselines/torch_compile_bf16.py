"""The same in bfloat16."""

from __future__ import annotations

from pathlib import Path

from edgec.bench.baselines import CHECKPOINT, _torch_peer

PLUGIN = True
TASKS = ("encoder", "causal-lm")
NAME = "torch-compile-bf16"
TOOL = "torch.compile (inductor), bf16"
SOURCE = CHECKPOINT

missing = _torch_peer.without_compiler


def build(source: Path, out: Path) -> None:
    _torch_peer.build(source, out, compiled=True, dtype="bfloat16")
