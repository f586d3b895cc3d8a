"""How a sentence-transformers folder turns token states into one embedding, read without sentence-transformers.

That library imports the classes named in `modules.json`; a checkpoint is untrusted here, so the names are only
compared. What cannot be reproduced in the graph (a Dense layer after the pooling, a mode beyond mean, cls and max) is
refused: an embedding that is silently another one is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from edgec.checkpoint import read_json
from edgec.errors import CheckpointError, UnsupportedModelError

PoolingMode = Literal["mean", "cls", "max"]
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Flags of folders saved before sentence-transformers 5.2, and the mode that each one stands for."""


@dataclass(frozen=True)
class Pooling:
    """states [B, S, d] fp32, mask [B, S] → embedding [B, d].

    mode: mean of the unmasked tokens, the first one (cls), or their maximum. normalize: to unit length afterwards.
    """

    mode: PoolingMode = "mean"
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(PoolingMode):
            raise UnsupportedModelError(f"pooling {self.mode!r}: edgec exports {', '.join(get_args(PoolingMode))}")


def read_pooling(folder: Path | str) -> Pooling | None:
    """The pooling that the folder's modules.json describes; None when there is none (a plain transformers folder).

    Raises CheckpointError for a malformed or escaping file, UnsupportedModelError for what the graph cannot hold.
    """
    folder = Path(folder)
    path = folder / "modules.json"
    if not (path.exists() or path.is_symlink()):
        return None
    kinds = _modules(_inside(folder, "modules.json"))
    names = [kind for kind, _ in kinds]
    if names == ["Transformer"]:
        return None
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedModelError(
            f"{path}: modules {' → '.join(names) or '(none)'}; edgec exports Transformer → Pooling [→ Normalize]"
        )
    config_path = _inside(folder, f"{kinds[1][1]}/config.json")
    config = read_json(config_path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_path}: expected an object, got {type(config).__name__}")
    return Pooling(_mode(config, config_path), normalize=names[-1] == "Normalize")


def _modules(path: Path) -> list[tuple[str, str]]:
    """(class name, folder) of each module, in order."""
    entries = read_json(path)
    if not isinstance(entries, list):
        raise CheckpointError(f"{path}: expected a list of modules, got {type(entries).__name__}")
    modules = []
    for entry in entries:
        kind, place = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(place, str):
            raise CheckpointError(f"{path}: expected modules with a type and a path, got {str(entry)[:80]}")
        modules.append((kind.rpartition(".")[2], place))
    return modules


def _mode(config: Mapping[str, Any], path: Path) -> PoolingMode:
    modes: list[Any]
    if "pooling_mode" in config:
        modes = config["pooling_mode"] if isinstance(config["pooling_mode"], list) else [config["pooling_mode"]]
    else:
        # No flag set means mean: the default of sentence-transformers.
        modes = [mode for flag, mode in _FLAGS.items() if config.get(flag) is True] or ["mean"]
    if config.get("include_prompt", True) is not True:
        raise UnsupportedModelError(
            f"{path}: include_prompt is off, which needs prompt lengths; edgec pools every token"
        )
    modes_known = get_args(PoolingMode)
    for mode in modes_known:
        if modes == [mode]:
            known: PoolingMode = mode
            return known
    raise UnsupportedModelError(f"{path}: pooling {str(modes)[:80]}; edgec exports one of {', '.join(modes_known)}")


def _inside(folder: Path, name: str) -> Path:
    """A regular file below the folder, also after following links; a hub cache's links into its own blobs/ are fine."""
    path = folder / name
    try:
        home, target = folder.resolve(), path.resolve()
        lexical = not Path(name).is_absolute() and ".." not in Path(name).parts
        hub_cache = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
        regular = target.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a link loop, a NUL in the name, a name too long
        raise CheckpointError(f"{folder}: cannot open {name[:200]!r} ({error})") from error
    if not lexical or not (target.is_relative_to(home) or hub_cache):
        raise CheckpointError(f"{folder}: {name[:200]!r} leads out of the folder; copy the file into it instead")
    if not regular:
        raise CheckpointError(f"{path}: missing, or not a regular file")
    return path
