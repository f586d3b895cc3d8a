"""edgec: a trained transformer in, the smallest measured artifact that a phone, a laptop or an offline server can run
out.

`edgec.load(folder)` gives back a transformers model of a compressed folder. Everything else is behind the command
line or the functions of `edgec.pipeline`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from edgec._version import __version__

if TYPE_CHECKING:
    import transformers

__all__ = ["__version__", "load"]


def load(folder: Path | str) -> transformers.PreTrainedModel:
    """A transformers model of a folder that `edgec compress` wrote: in eval mode on the CPU, float32.

    Raises CheckpointError.
    """
    # By name, so that `import edgec` takes no second for torch and a device that has no torch can import its parts.
    store = importlib.import_module("edgec.compress.store")
    model: transformers.PreTrainedModel = store.load(folder)
    return model
