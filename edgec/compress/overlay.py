"""A checkpoint with some of its vectors replaced: what healing taught biases and norms, for front ends that read
folders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edgec import modeling
from edgec.checkpoint import Checkpoint, open_checkpoint
from edgec.companions import copy_companions


def write_overlay(checkpoint: Checkpoint, vectors: Mapping[str, NDArray[np.float32]], out: Path) -> Checkpoint:
    """vectors: the model's own parameter name → values, stored as float32. Everything else is copied into the new
    folder `out`.
    """
    out.mkdir(parents=True)
    tensors: dict[str, NDArray[Any]] = {}
    for name, place in modeling.places(modeling.without_memory(checkpoint), checkpoint).items():
        tensors[name] = np.asarray(vectors[place], np.float32) if place in vectors else np.array(checkpoint.read(name))
    (out / "config.json").write_text(json.dumps(dict(checkpoint.config)), encoding="utf-8")
    save_file(tensors, out / "model.safetensors")
    copy_companions(checkpoint.folder, out)
    return open_checkpoint(out)
