"""GGUF in: a dense .gguf becomes the transformers folder that every other stage reads.

A GGUF is a checkpoint like any other once it is a folder, so it is turned into one where a MODEL argument is resolved,
and no stage behind that knows. Turned down: transformers' own `gguf_file=`. For these families its reader believes the
file's counts, guesses head sizes and the soft caps of Gemma from defaults, drops rotary scaling, and may give the
vocabulary a token that the model has no row for.

Only what was not rounded is read (F32, F16, BF16, and Q8_0, whose rounding is small enough to start from): compressing
what was already compressed would measure its loss against the wrong model.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path

from edgec import limits
from edgec.errors import CheckpointError
from edgec.gguf_header import GgufHeader, is_gguf, read_header
from edgec.gguf_in.config import config_of
from edgec.gguf_in.tensors import safetensors_bytes, write_safetensors
from edgec.gguf_in.tokenizer import write_tokenizer

logger = logging.getLogger(__name__)

__all__ = ["is_gguf", "resolve", "write_folder"]

_kept: list[tempfile.TemporaryDirectory[str]] = []
"""Folders live until the process ends: every stage reads its tensors lazily."""


def resolve(model: Path) -> Path:
    """A folder as it is; a .gguf as a transformers folder of the same name, which is deleted when the process ends.

    Raises CheckpointError and UnsupportedModelError as `write_folder` does.
    """
    if not is_gguf(model):
        return model
    room = tempfile.TemporaryDirectory(prefix="edgec-gguf-")
    try:
        folder = write_folder(model, Path(room.name) / model.stem)
    except BaseException:
        room.cleanup()
        raise
    _kept.append(room)
    return folder


def write_folder(path: Path, out: Path) -> Path:
    """Write config.json, model.safetensors and the tokenizer of a GGUF into the new folder `out`; returns `out`.

    Raises CheckpointError for a file that is damaged, quantised, or contradicts itself, UnsupportedModelError for
    another family.
    """
    header = read_header(path)
    config = config_of(header)
    _check_room(header, out)
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True), encoding="utf-8")
    write_safetensors(header, config, out / "model.safetensors")
    write_tokenizer(header, int(config["vocab_size"]), out)
    logger.info("%s: a %s of %d tensors, as a folder in %s", path, header.architecture, len(header.tensors), out)
    return out


def _check_room(header: GgufHeader, out: Path) -> None:
    need = safetensors_bytes(header)
    parent = next(p for p in out.absolute().parents if p.is_dir())
    free = shutil.disk_usage(parent).free
    if need + limits.MAX_GGUF_HEADER_BYTES > free:
        raise CheckpointError(
            f"{header.path}: its weights take {need / 1e9:.1f} GB as a folder, {free / 1e9:.1f} GB are free in "
            f"{parent}; set TMPDIR to a disk with more"
        )
