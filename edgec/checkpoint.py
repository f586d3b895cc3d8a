"""An untrusted transformers folder in, a `Checkpoint` out. Nothing in the folder is ever executed or unpickled.

The safetensors headers are parsed here rather than by the safetensors library, because every claim in them
(length, offsets, shapes, overlaps) is checked against the bytes that are really there before anything is
allocated, and each error can name the file and the tensor. Tensors are memory-mapped: opening a checkpoint costs
no memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edgec import limits
from edgec.errors import CheckpointError, NumericsError

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}"]', re.DOTALL)
"""Strings, which are skipped, and brackets; a quote by itself begins a string that never ends."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lives: file, dtype as safetensors names it, shape, and absolute byte range in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Checkpoint:
    """A checked transformers folder. config is config.json as parsed; tensors are not read until asked for."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def architecture(self) -> str:
        """The class that config.json names first; open_checkpoint made sure that there is one."""
        return str(self.config["architectures"][0])

    @cached_property
    def parameters(self) -> int:
        """Distinct parameters: safetensors stores a tied table once [count]."""
        return sum(math.prod(t.shape) for t in self.tensors.values() if t.dtype[0] in "FB" and t.dtype != "BOOL")

    def read(self, name: str) -> NDArray[Any]:
        """A read-only view of one tensor in its stored dtype, memory-mapped."""
        info = self.tensors[name]
        if info.start == info.stop:
            return np.empty(info.shape, _DTYPES[info.dtype])
        flat = np.memmap(info.file, mode="r", dtype=np.uint8, offset=info.start, shape=(info.stop - info.start,))
        values: NDArray[Any] = flat.view(_DTYPES[info.dtype]).reshape(info.shape)
        return values

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config and every tensor's name, dtype, shape and bytes, in name order: "sha256:…"."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(json.dumps([name, info.dtype, info.shape]).encode())
            with info.file.open("rb") as file:
                file.seek(info.start)
                remaining = info.stop - info.start
                while remaining:
                    chunk = file.read(min(remaining, 1 << 22))
                    if not chunk:
                        raise CheckpointError(
                            f"{info.file}: tensor {name!r} ends early; the file changed while it was read"
                        )
                    digest.update(chunk)
                    remaining -= len(chunk)
        return f"sha256:{digest.hexdigest()}"

    def check_finite(self, progress: Callable[[str], None] | None = None) -> None:
        """Raises NumericsError naming the first tensor that holds NaN or Inf."""
        for name, info in sorted(self.tensors.items()):
            if progress:
                progress(name)
            if info.dtype[0] not in "FB" or info.dtype == "BOOL":
                continue
            flat = self.read(name).reshape(-1)
            for start in range(0, flat.size, 1 << 22):
                part = flat[start : start + (1 << 22)]
                if not np.isfinite(part).all():
                    kind = "NaN" if np.isnan(part).any() else "Inf"
                    raise NumericsError(
                        f"{info.file.name}: tensor {name!r} holds {kind}; expected finite weights. "
                        "Re-save the checkpoint from a run that did not diverge"
                    )


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Check a transformers folder and map its tensors. Raises CheckpointError naming the file and the way out."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "a file, which is unpacked first if it is an archive" if folder.is_file() else "no such folder"
        raise CheckpointError(f"{folder}: {what}; expected a transformers folder with config.json and *.safetensors")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; expected a transformers folder (save_pretrained writes one)")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{folder / 'config.json'}: no model_type; expected a transformers model configuration")
    names = config.get("architectures")
    if not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        raise CheckpointError(
            f'{folder / "config.json"}: no architectures; expected the model class, e.g. ["BertModel"]'
        )
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(folder):
        for name, info in read_safetensors_header(file).items():
            if name in tensors:
                raise CheckpointError(f"{file.name}: tensor {name!r} is already defined in {tensors[name].file.name}")
            tensors[name] = info
    return Checkpoint(folder, config, tensors)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").exists():  # beside an index, transformers too takes the single file
        return [_inside(folder, "model.safetensors")]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        body = read_json(index)
        weight_map = body.get("weight_map") if isinstance(body, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index}: no weight_map; expected tensor name → file name")
        shards = sorted(set(weight_map.values()))
        if len(shards) > limits.MAX_SHARDS:
            raise CheckpointError(f"{index}: {len(shards)} shards, at most {limits.MAX_SHARDS} are read")
        files = [_inside(folder, shard) for shard in shards]
        present = {name for file in files for name in read_safetensors_header(file)}
        if lacking := sorted(set(weight_map) - present):
            raise CheckpointError(f"{index}: {len(lacking)} tensors are in no shard, first {lacking[0]!r}")
        return files
    if any(found for pattern in _PICKLES for found in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder}: only pickled weights (*.bin, *.pt), which can run code when loaded; convert them on a machine "
            "you trust with transformers' save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def _inside(folder: Path, name: str) -> Path:
    """A regular file directly in the folder. A hub cache's links into its own blobs/ are fine, others are not."""
    if Path(name).name != name or name in {"", ".", ".."}:
        raise CheckpointError(f"{folder}: weight file {name!r} is not a plain file name")
    path = folder / name
    try:
        target, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its symbolic links go in a circle") from error
    hub_cache = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if target.parent != home and not hub_cache:
        raise CheckpointError(f"{path}: links out of the folder to {target}; copy the file instead")
    if not target.is_file():
        raise CheckpointError(f"{path}: missing, or not a regular file")
    return path


def read_json(path: Path) -> Any:
    """JSON with caps on size and depth; duplicate keys and NaN are refused."""
    try:
        with path.open("rb") as file:
            raw = file.read(limits.MAX_JSON_BYTES + 1)
        if len(raw) > limits.MAX_JSON_BYTES:
            size = path.stat().st_size
            raise CheckpointError(f"{path}: {size} bytes of JSON, at most {limits.MAX_JSON_BYTES} are parsed")
        text = raw.decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 (byte {error.start})") from error
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> Any:
    """`read_json` for text; `where` names it in errors."""
    depth = 0
    for token in _BRACKETS.finditer(text):  # the C parser recurses: depth is capped before it sees the text
        if token[0] in "[{":
            depth += 1
            if depth > limits.MAX_JSON_DEPTH:
                raise CheckpointError(f"{where}: JSON nested deeper than {limits.MAX_JSON_DEPTH} levels")
        elif token[0] in "]}":
            depth -= 1
        elif token[0] == '"':
            raise CheckpointError(f"{where}: not JSON (a string that begins at character {token.start()} has no end)")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CheckpointError(f"{where}: key {key!r} appears twice")
            result[key] = value
        return result

    def no_constant(name: str) -> Any:
        raise CheckpointError(f"{where}: {name} is not JSON")

    def finite(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise CheckpointError(f"{where}: the number {digits[:40]} is too large")
        return value

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant, parse_float=finite)
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{where}: not JSON ({error})") from error


def read_safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Check one safetensors header against the bytes that are there: length, dtypes, shapes, no gap, no overlap."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: {size} bytes; too short for a safetensors file")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(limits.MAX_SAFETENSORS_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: header claims {length} bytes, the file has {size - 8} after its length")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        header = parse_json(raw.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: the header is not UTF-8") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not an object")
    header.pop("__metadata__", None)
    if len(header) > limits.MAX_TENSORS:
        raise CheckpointError(f"{path}: {len(header)} tensors, at most {limits.MAX_TENSORS} are read")
    tensors = dict(_tensor_infos(path, header, 8 + length, size))
    end = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            raise CheckpointError(
                f"{path}: tensor {name!r} starts at byte {info.start}, expected {end} (gap or overlap)"
            )
        end = info.stop
    if end != size:
        raise CheckpointError(
            f"{path}: {size - end} bytes after the last tensor; the file is damaged or not safetensors"
        )
    return tensors


def _tensor_infos(path: Path, header: dict[str, Any], base: int, size: int) -> Iterator[tuple[str, TensorInfo]]:
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]} if (
                len(entry) == 3
            ):
                pass
            case _:
                raise CheckpointError(
                    f"{path}: tensor {name!r} lacks dtype, shape or data_offsets, or has something else"
                )
        if dtype not in _DTYPES:
            raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype!r}; known: {', '.join(_DTYPES)}")
        sound = len(shape) <= limits.MAX_TENSOR_RANK and all(type(d) is int and d >= 0 for d in shape)
        if not sound or math.prod(d for d in shape if d) >= 1 << 48:  # numpy refuses [0, 2⁶⁰] too
            raise CheckpointError(f"{path}: tensor {name!r} has shape {str(shape)[:200]}")
        if max(abs(start), abs(stop)) >= 1 << 63:
            raise CheckpointError(f"{path}: tensor {name!r} has data_offsets that no file has")
        expected = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        if not 0 <= start <= stop <= size - base or stop - start != expected:
            raise CheckpointError(
                f"{path}: tensor {name!r} ({dtype} {shape}) needs {expected} bytes, its offsets {start}–{stop} give "
                f"{stop - start} of the {size - base} in the file"
            )
        yield name, TensorInfo(path, dtype, tuple(shape), base + start, base + stop)
