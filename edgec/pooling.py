"""How a sentence-transformers folder turns token vectors into one sentence vector. Parsed defensively, torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgec.checkpoint import read_json
from edgec.errors import CheckpointError

MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}


@dataclass(frozen=True)
class Pooling:
    """mode: "mean" (over unmasked tokens), "cls" (first token) or "max". normalize: scale to unit length."""

    mode: str = "mean"
    normalize: bool = True


def read_pooling(folder: Path) -> Pooling | None:
    """From modules.json and 1_Pooling/config.json; None where the folder has no modules.json.

    Only plain module folders inside `folder` are looked at. Raises CheckpointError for a mode that is not in MODES.
    """
    listing = folder / "modules.json"
    if not listing.is_file():
        return None
    modules = read_json(listing)
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise CheckpointError(f"{listing}: expected a list of modules")
    mode, normalize = "mean", False
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Normalize":
            normalize = True
        elif kind == "Pooling":
            mode = _read_mode(folder, str(module.get("path", "")))
        elif kind != "Transformer":
            raise CheckpointError(f"{listing}: module {kind!r} is not supported; known: Transformer, Pooling, Normalize")
    return Pooling(mode, normalize)


def _read_mode(folder: Path, name: str) -> str:
    if Path(name).name != name or name in {"", ".", ".."} or (folder / name).is_symlink():
        raise CheckpointError(f"{folder / 'modules.json'}: pooling path {name!r} is not a plain folder name")
    path = folder / name / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected an object")
    if "pooling_mode" in config:
        chosen = [config["pooling_mode"]] if config["pooling_mode"] in MODES.values() else []
    else:
        chosen = [short for key, short in MODES.items() if config.get(key) is True]
    if len(chosen) != 1:
        raise CheckpointError(f"{path}: expected exactly one pooling mode of {', '.join(MODES.values())}")
    return str(chosen[0])
