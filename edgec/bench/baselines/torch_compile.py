"""transformers through torch.compile, fp32; compiling counts as load."""

from __future__ import annotations

from pathlib import Path

from edgec.bench.baselines import CHECKPOINT, _torch_peer

PLUGIN = True
TASKS = ("encoder", "causal-lm")
NAME = "torch-compile"
TOOL = "torch.compile (inductor), fp32"
SOURCE = CHECKPOINT

missing = _torch_peer.without_compiler


def build(source: Path, out: Path) -> None:
    _torch_peer.build(source, out, compiled=True, dtype="float32")
