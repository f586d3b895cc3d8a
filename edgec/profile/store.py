"""The Profile record and its folder: profile.json to read, statistics.safetensors to compute with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edgec.checkpoint import Checkpoint, read_json
from edgec.errors import EdgecError, ProfileError
from edgec.outputs import staged_folder
from edgec.profile.activations import Statistics
from edgec.records import Choice, LayerProfile

Array = NDArray[Any]

PROFILE_VERSION = 2

_ARRAYS = {"H": "second_moments", "G": "curvatures", "Hm": "mean_moments", "Gm": "mean_curvatures"}
"""Prefix of a tensor's name in the file → field of Statistics."""


@dataclass(frozen=True)
class Profile:
    """Of one checkpoint on one calibration text. targets: those whose forms were scored; () where that is not known."""

    fingerprint: str
    calibration: str
    tokens: int
    layers: tuple[LayerProfile, ...]
    statistics: Statistics = field(repr=False)
    targets: tuple[str, ...] = ()
    version: int = PROFILE_VERSION

    def by_layer(self) -> dict[str, LayerProfile]:
        return {layer.name: layer for layer in self.layers}

    def require(self, checkpoint: Checkpoint) -> None:
        """Raises ProfileError when the profile was made from another checkpoint."""
        if self.fingerprint != checkpoint.fingerprint:
            raise ProfileError(
                f"the profile is of {self.fingerprint[:19]}…, {checkpoint.folder} is {checkpoint.fingerprint[:19]}…: "
                f"stale; run `edgec profile {checkpoint.folder}` again"
            )


def save_profile(profile: Profile, out: Path, *, force: bool = False) -> None:
    """Write the folder, whole or not at all. Arrays shared by several layers are stored once."""
    tensors: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    seen: dict[int, str] = {}
    for prefix, field_name in _ARRAYS.items():
        for name, array in sorted(getattr(profile.statistics, field_name).items()):
            key = f"{prefix}:{name}"
            if id(array) in seen:
                aliases[key] = seen[id(array)]
            else:
                seen[id(array)] = key
                tensors[key] = np.ascontiguousarray(array)
    body = {
        "version": profile.version,
        "fingerprint": profile.fingerprint,
        "calibration": profile.calibration,
        "tokens": profile.tokens,
        "sentences": profile.statistics.sentences,
        "aliases": aliases,
        "targets": list(profile.targets),
        "layers": [asdict(layer) for layer in profile.layers],
    }
    with staged_folder(out, force=force) as stage:
        (stage / "profile.json").write_text(json.dumps(body, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        save_file(tensors, stage / "statistics.safetensors")


def load_profile(folder: Path, checkpoint: Checkpoint | None = None) -> Profile:
    """Read a profile folder; with a checkpoint, refuse one that is not of it. Raises ProfileError."""
    try:
        body = read_json(folder / "profile.json")
        if body.get("version") != PROFILE_VERSION:
            raise ProfileError(
                f"{folder}: profile version {body.get('version')}, this edgec reads {PROFILE_VERSION}; profile again"
            )
        tensors = load_file(folder / "statistics.safetensors")
        for alias, key in body["aliases"].items():
            tensors[alias] = tensors[key]
        arrays: dict[str, dict[str, Array]] = {prefix: {} for prefix in _ARRAYS}
        for key, array in tensors.items():
            prefix, _, name = key.partition(":")
            arrays[prefix][name] = array
        statistics = Statistics(
            arrays["H"], arrays["G"], int(body["tokens"]), arrays["Hm"], arrays["Gm"], int(body["sentences"])
        )
        layers = tuple(_layer(entry) for entry in body["layers"])
        targets = tuple(map(str, body.get("targets", ())))
        profile = Profile(
            str(body["fingerprint"]), str(body["calibration"]), int(body["tokens"]), layers, statistics, targets
        )
    except ProfileError:
        raise
    except (EdgecError, OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProfileError(f"{folder}: not a readable edgec profile ({error}); run `edgec profile` again") from error
    if checkpoint is not None:
        profile.require(checkpoint)
    return profile


def _layer(entry: dict[str, Any]) -> LayerProfile:
    candidates = tuple(Choice.from_dict(c) for c in entry.pop("candidates"))
    entry["shape"] = tuple(entry["shape"])
    entry["singular"] = tuple(entry["singular"])
    return LayerProfile(**entry, candidates=candidates)
