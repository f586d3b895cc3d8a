"""Reading an artifact folder without trusting it: capped JSON, and paths that stay inside."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgec import limits
from edgec.errors import CheckpointError
from edgec.gguf_header import is_gguf, read_header

FORMAT_KEY = "edgec.format"
"""Metadata key of factored GGUF files: the version of their layout."""

MANIFEST_FILE, COMPRESSED = "edgec.json", "compressed"
"""The file and the kind in it that mark what `edgec compress` wrote; `edgec.records` does not travel to devices."""

FIRST_LOGITS = "edgec.first_logits"
"""Input with a default of the decoder graphs that edgec exports, int64 [1]: the first position whose logits are
computed. Left out, only the last one's are, which is all that generating needs; 0 gives those of every position."""


def read_json(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """A JSON object from a file. unique: a key that stands twice is refused, as for files that another parser reads
    after us. Raises CheckpointError for a missing, oversized or malformed one.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(limits.MAX_JSON_BYTES + 1)
        if len(raw) > limits.MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; at most {limits.MAX_JSON_BYTES} are read")
        value = json.loads(raw, object_pairs_hook=_unique if unique else None)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def optional_json(path: Path) -> dict[str, Any]:
    """The same, {} when the file does not exist."""
    return read_json(path) if path.is_file() else {}


def is_compressed(folder: Path) -> bool:
    """Did `edgec compress` write this folder? No runtime loads it; torch does where edgec is installed."""
    return optional_json(folder / MANIFEST_FILE).get("kind") == COMPRESSED


def gguf_file(path: Path, *, factored: bool) -> bool:
    """Is this one GGUF file instead of a folder, and one of edgec's factored ones or not? Raises CheckpointError."""
    return is_gguf(path) and _is_factored(path, path.stat().st_mtime_ns) == factored


@lru_cache(maxsize=8)
def _is_factored(path: Path, changed: int) -> bool:
    """Remembered, because every loader asks, and a vocabulary takes a while to read."""
    return FORMAT_KEY in read_header(path).metadata


def inside(folder: Path, name: Any, source: Path) -> Path:
    """`folder/name` for a name that `source` gave. Raises CheckpointError when it leaves the folder or is missing."""
    path = folder / str(name)
    try:
        outside, there = not path.resolve().is_relative_to(folder.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, links in a circle
        raise CheckpointError(f"{source} names the file {str(name)[:80]!r}, which is no name of a file") from error
    if outside:
        raise CheckpointError(f"{source} names the file {name!r}, which lies outside {folder}")
    if not there:
        raise CheckpointError(f"{source} names the file {name!r}, which is not in {folder}")
    return path


def whole_number(record: dict[str, Any], key: str, source: Path, low: int = 1, high: int = limits.MAX_DIMENSION) -> int:
    """An integer of a config within its bounds. Raises CheckpointError."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise CheckpointError(f"{source}: {key} must be a whole number between {low} and {high}, got {value!r}")
    return value
