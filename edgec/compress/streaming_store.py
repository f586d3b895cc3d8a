"""Writing the Compressed folder while it is being fitted: the same names and the same bytes as `store.save_compressed`.

Tensors are gathered into files of about `limits.SHARD_BYTES` in the order in which they come, and named as sharded
transformers checkpoints are (`model-00001-of-0000N.safetensors` and an index) once their number is known. Appending
to one large file was turned down: the header of a safetensors file stands in front and lists everything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors.numpy import save_file

from edgec import limits, modeling
from edgec.checkpoint import Checkpoint
from edgec.companions import copy_companions
from edgec.compress.store import _CONFIG_KEY, COMPRESSED_VERSION, factor_tensors
from edgec.errors import PlanError
from edgec.fit import Factors
from edgec.outputs import staged_folder
from edgec.records import Plan, as_dict

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class CompressedWriter:
    """Takes factors as they come. shard_bytes: what is held in memory before a file is written [bytes]."""

    def __init__(self, stage: Path, shard_bytes: int = limits.SHARD_BYTES) -> None:
        self.stage, self.shard_bytes = stage, shard_bytes
        self.aliases: dict[str, str] = {}
        self.layers: set[str] = set()
        self._shard: dict[str, NDArray[Any]] = {}
        self._files: list[tuple[Path, list[str]]] = []
        self._total = 0

    def add(self, factors: Mapping[str, Factors]) -> None:
        """Layers that share cores must come in one call: what they share is stored once. Each layer comes once."""
        if again := sorted(self.layers & factors.keys()):
            raise PlanError(f"layer {again[0]!r} is already written")
        self.layers.update(factors)
        for name, values in factor_tensors(factors, self.aliases):
            self.put(name, values)

    def put(self, name: str, values: NDArray[Any]) -> None:
        """One tensor, contiguous; kept until its file is written."""
        if self._shard and _bytes(self._shard) + values.nbytes > self.shard_bytes:
            self._flush()
        self._shard[name] = values

    def _flush(self) -> None:
        path = self.stage / f"part-{len(self._files):05d}.safetensors"
        save_file(dict(sorted(self._shard.items())), path)
        self._total += _bytes(self._shard)
        self._files.append((path, list(self._shard)))
        self._shard = {}

    def close(self) -> None:
        """Give the files their names, and write the index where there are several."""
        if self._shard or not self._files:
            self._flush()
        if len(self._files) == 1:
            self._files[0][0].rename(self.stage / _SINGLE)
            return
        index: dict[str, str] = {}
        for number, (path, names) in enumerate(self._files, start=1):
            file = f"model-{number:05d}-of-{len(self._files):05d}.safetensors"
            path.rename(self.stage / file)
            index |= dict.fromkeys(names, file)
        record = {"metadata": {"total_size": self._total}, "weight_map": index}
        _write_json(self.stage / _INDEX, record)


@contextmanager
def streamed_folder(
    checkpoint: Checkpoint,
    plan: Plan,
    plan_text: str,
    out: Path,
    *,
    force: bool = False,
    shard_bytes: int = limits.SHARD_BYTES,
) -> Iterator[CompressedWriter]:
    """A writer whose folder becomes `out` when the block ends without an error: then everything that no factors
    replaced is copied from the checkpoint. Raises OutputError, PlanError when a layer of the plan did not come.
    """
    with staged_folder(out, force=force) as stage:
        writer = CompressedWriter(stage, shard_bytes)
        yield writer
        if lacking := sorted({c.layer for c in plan.choices} - writer.layers):
            raise PlanError(f"{len(lacking)} layers of the plan were not fitted, first {lacking[0]!r}")
        for name, place in modeling.places(modeling.skeleton(checkpoint), checkpoint).items():
            if place.removesuffix(".weight") not in writer.layers:
                writer.put(place, checkpoint.read(name))
        writer.close()
        body = {
            "version": COMPRESSED_VERSION,
            "dense_fingerprint": checkpoint.fingerprint,
            "plan": as_dict(plan),
            "aliases": writer.aliases,
        }
        manifest = {"kind": "compressed", "version": COMPRESSED_VERSION, "fingerprint": checkpoint.fingerprint}
        _write_json(stage / "config.json", {**checkpoint.config, _CONFIG_KEY: body})
        _write_json(stage / "edgec.json", manifest)
        (stage / "plan.yaml").write_text(plan_text, encoding="utf-8")
        copy_companions(checkpoint.folder, stage)


def _bytes(tensors: Mapping[str, NDArray[Any]]) -> int:
    return sum(t.nbytes for t in tensors.values())


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
