"""Folders that torch runs: nothing is built but a note of what to load (`edgec.bench.loaders.torch_models`)."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from edgec.bench.jobs import PEER_FILE


def build(source: Path, out: Path, *, compiled: bool, dtype: str) -> None:
    told = {"loader": "torch_models", "checkpoint": str(source.resolve()), "compile": compiled, "dtype": dtype}
    (out / PEER_FILE).write_text(json.dumps(told, indent=1), encoding="utf-8")


def without_compiler() -> str:
    """Why `torch.compile` cannot work here; "" when it can. It takes $CXX, or g++ and clang++ by their names."""
    names = [name for name in (os.environ.get("CXX", ""), "g++", "clang++") if name]
    if sys.platform == "linux" and not any(shutil.which(name) for name in names):
        return "torch.compile needs a C++ compiler (g++ or clang++), and none is on PATH; install one"
    return ""
