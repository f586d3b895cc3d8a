"""Opens an exported folder with the runtime that its files are for."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

from edgec import plugins
from edgec.errors import CheckpointError
from edgec.gguf_header import is_gguf
from edgec.runtime.interfaces import CausalLM, Encoder
from edgec.runtime.options import RuntimeOptions


class Loader(Protocol):
    """What a loader file defines at module level."""

    def claims(self, folder: Path) -> bool: ...
    def prepare(self) -> dict[str, str]: ...
    def load(self, folder: Path, options: RuntimeOptions) -> Encoder | CausalLM: ...


def open_artifact(folder: Path | str, options: RuntimeOptions | None = None) -> Encoder | CausalLM:
    """The artifact in `folder`, or a .gguf file, loaded with the runtime that it is for. Raises CheckpointError."""
    return find_loader(Path(folder)).load(Path(folder), options or RuntimeOptions())


def find_loader(folder: Path) -> Loader:
    """The loader that claims `folder`, or a .gguf file. Raises CheckpointError when none, or more than one, does."""
    if not (folder.is_dir() or is_gguf(folder)):
        raise CheckpointError(f"{folder} is not a folder; give one that `edgec export -o` wrote, or a .gguf file")
    claimants = [name for name in plugins.names("edgec.runtime") if _loader(name).claims(folder)]
    if not claimants:
        raise CheckpointError(
            f"{folder} holds nothing that a runtime here can load; expected model.onnx with tokenizer.json and "
            "config.json (an encoder), or genai_config.json or model.gguf (a causal LM)"
        )
    if len(claimants) > 1:
        raise CheckpointError(f"{folder} holds artifacts of several runtimes ({', '.join(claimants)}); keep one")
    return _loader(claimants[0])


def _loader(name: str) -> Loader:
    return cast(Loader, plugins.load("edgec.runtime", name))
