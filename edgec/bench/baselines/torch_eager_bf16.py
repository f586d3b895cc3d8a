"""The same in bfloat16: half the bytes, and as fast as the processor does them (slow before AVX-512 BF16 and AMX)."""

from __future__ import annotations

from pathlib import Path

from edgec.bench.baselines import CHECKPOINT, _torch_peer

PLUGIN = True
TASKS = ("encoder", "causal-lm")
NAME = "torch-eager-bf16"
TOOL = "torch, eager, bf16"
SOURCE = CHECKPOINT


def build(source: Path, out: Path) -> None:
    _torch_peer.build(source, out, compiled=False, dtype="bfloat16")
