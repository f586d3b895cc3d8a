"""Loaders that generate or embed from a finished folder: what a device runs, and nothing that a device lacks.

No module here imports torch, transformers or onnx, and the runtimes themselves are imported when a folder is
opened, not before: a measurement worker must show the memory of one runtime, not of all of them. A loader is a
plugin (`PLUGIN = True`) that defines

    claims(folder) -> bool              from the files found, without opening a model
    prepare() -> dict[str, str]         imports its runtime and returns the versions; nothing is loaded yet
    load(folder, options) -> Encoder | CausalLM

so that another runtime (llama.cpp, ggml, …) is one more file.
"""

from __future__ import annotations

from edgec.runtime.artifact import find_loader, open_artifact
from edgec.runtime.interfaces import CausalLM, Encoder, Piece
from edgec.runtime.options import RuntimeOptions, physical_cores

__all__ = ["CausalLM", "Encoder", "Piece", "RuntimeOptions", "find_loader", "open_artifact", "physical_cores"]
