"""Runs factored GGUF files (`model.factored.gguf`, docs/gguf-factored.md) on ggml's own kernels.

llama.cpp has no way to run a factored weight without its dense base, so the blocks are built here, as ggml graphs over
the shared libraries inside the llama-cpp-python wheel, driven through ctypes. A fork of llama.cpp was turned down: it
would have to be built and kept up for every platform that the wheel already covers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgec.runtime.layout import gguf_file
from edgec.runtime.options import RuntimeOptions

if TYPE_CHECKING:
    from edgec.runtime.ggml.model import GgmlModel

PLUGIN = True
MODEL_FILE = "model.factored.gguf"


def claims(folder: Path) -> bool:
    return (folder / MODEL_FILE).is_file() or gguf_file(folder, factored=True)


def prepare() -> dict[str, str]:
    from edgec.runtime.ggml.library import library
    from edgec.runtime.llama_cpp import import_llama_cpp

    library()
    return {"llama-cpp-python": str(import_llama_cpp().__version__)}


def load(folder: Path, options: RuntimeOptions) -> GgmlModel:
    from edgec.runtime.ggml.model import GgmlModel

    model = GgmlModel(folder, options)
    if model.has_vocabulary:
        _ = model.vocabulary  # loaded means ready for text, as it does of every other runtime
    return model
