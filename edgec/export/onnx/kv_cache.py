"""A decoder whose keys and values are kept in int8: a quarter of fp32's bytes, nothing else changed.

onnxruntime's GroupQueryAttention keeps its cache in int8 on the CPU too (attributes `k_quant_type`, `v_quant_type`,
`kv_cache_bit_width`, inputs 12 and 13; microsoft/onnxruntime pull requests 28576 and 28578; tried in 1.31), and
onnxruntime-genai 0.18 allocates whatever type the graph's inputs have. The scales are constants of the graph, one per
head and channel, so they must be known beforehand: the finished artifact is run over calibration text, and the largest
key and value of every channel counted. A larger one that comes later is clipped; scales per token, which would follow
it, are not in the CPU kernel. So this is a step from artifact to artifact, not an option of a runtime as it is for GGUF
(`RuntimeOptions.kv_cache`): weights are not touched, and both artifacts can be measured side by side. int4
(`kv_cache_bit_width` 4) was turned down until somebody needs it: its steps are eighteen times as coarse.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgec.calibration import Text, load_text
from edgec.checkpoint import read_json
from edgec.errors import CalibrationError, CheckpointError, ExportError
from edgec.outputs import staged_folder
from edgec.records import MANIFEST_NAME
from edgec.runtime.genai import GenaiModel
from edgec.runtime.ort_decoder import OrtDecoder

Progress = Callable[[str, int, int], None]
Ids = NDArray[np.int64]
Peaks = Mapping[str, NDArray[np.float32]]
"""Name of a cache input → the largest absolute value of every head and channel, [heads, head_dim] float32."""

WINDOW = 256
"""Tokens that are run at a time, at most [count]."""
CALIBRATION_TOKENS, HELD_OUT_TOKENS = 8192, 2048
_LEAST_TOKENS = 512
_PAST_KEY, _PAST_VALUE, _K_SCALE, _V_SCALE = 3, 4, 12, 13
_STEPS = 127
_LEAST_PEAK = 1e-6
"""A channel that is always zero still needs a scale above zero."""


@dataclass(frozen=True)
class Int8Cache:
    """What was made. bytes_before, bytes_after: of the cache per token. kl, top1: of the new artifact against the old
    one on `tokens` tokens of `text` that did not calibrate, in nats per token and as a share.
    """

    out: str
    layers: int
    bytes_before: int
    bytes_after: int
    kl: float
    top1: float
    tokens: int
    text: str


def quantise(
    artifact: Path, out: Path, *, calibration: Path | None = None, force: bool = False, progress: Progress
) -> Int8Cache:
    """Writes a copy of a causal LM's ONNX folder to `out` whose cache is int8, and measures what that costs.

    Raises CheckpointError for a folder that is none, ExportError for a graph without GroupQueryAttention or with a
    cache that is quantised already, CalibrationError for too little text, OutputError.
    """
    decoder = OrtDecoder(artifact)
    if any(np.issubdtype(cache.dtype, np.integer) for cache in decoder.caches):
        raise ExportError(f"{artifact}: its KV cache is quantised already")
    text = load_text(calibration)
    reader = GenaiModel(artifact)
    windows = list(_windows(text.split("calibrate"), reader, CALIBRATION_TOKENS))
    held_out = list(_windows(text.split("validate"), reader, HELD_OUT_TOKENS))
    del reader
    peaks: dict[str, NDArray[np.float32]] = {}
    for done, ids in enumerate(windows):
        progress("calibrating the cache", done, len(windows))
        for name, found in decoder.cache_peaks(ids).items():
            peaks[name] = np.maximum(peaks[name], found) if name in peaks else found
    progress("calibrating the cache", len(windows), len(windows))
    with staged_folder(out, force=force) as stage:
        _copy(artifact, stage)
        file = decoder.path.name
        layers = rewrite(stage / file, peaks)
        made = OrtDecoder(stage)
        kl, top1 = _difference(decoder, made, held_out, progress)
        before, after = (sum(c.heads * c.size * np.dtype(c.dtype).itemsize for c in d.caches) for d in (decoder, made))
        tokens = sum(map(len, held_out))
        origin = text.split("validate").origin
        result = Int8Cache(str(out), layers, before, after, kl, top1, tokens, origin)
        _update_manifest(stage, file, result)
    return result


def rewrite(path: Path, peaks: Peaks) -> int:
    """Changes model.onnx in place (its weights stay where they are); returns how many layers. Raises ExportError."""
    model = onnx.load(str(path), load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    if not nodes:
        raise ExportError(f"{path} has no GroupQueryAttention: only that operator keeps a cache in int8")
    rewritten: set[str] = set()
    for node in nodes:
        node.input.extend([""] * (_V_SCALE + 1 - len(node.input)))
        for past, slot in ((_PAST_KEY, _K_SCALE), (_PAST_VALUE, _V_SCALE)):
            name = node.input[past]
            if name not in peaks or node.input[slot]:
                raise ExportError(f"{path}: {node.name or 'an attention'} has no plain cache of its own ({name!r})")
            scales = np.maximum(peaks[name], _LEAST_PEAK).reshape(-1) / _STEPS
            node.input[slot] = f"{name}.scale"
            model.graph.initializer.append(numpy_helper.from_array(scales.astype(np.float32), node.input[slot]))
            rewritten.add(name)
        rewritten.update(node.output[1:3])
        node.attribute.extend(
            [
                helper.make_attribute("k_quant_type", "PER_CHANNEL"),
                helper.make_attribute("v_quant_type", "PER_CHANNEL"),
                helper.make_attribute("kv_cache_bit_width", 8),
            ]
        )
    if missing := sorted(set(peaks) - rewritten):
        raise ExportError(f"{path}: nothing that keeps its cache in int8 reads {missing[0]}")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.name in rewritten:
            value.type.tensor_type.elem_type = TensorProto.INT8
    onnx.save_model(model, str(path))
    return len(nodes)


def _windows(text: Text, reader: GenaiModel, tokens: int) -> Iterator[Ids]:
    """Ids of a split in windows, `tokens` in all. Raises CalibrationError where there is too little text."""
    room = min(WINDOW, reader.context_length - 1)
    gathered: list[int] = []
    for item in text.items:
        gathered += reader.encode(item)
        if len(gathered) >= tokens:
            break
    if len(gathered) < _LEAST_TOKENS:
        raise CalibrationError(f"{text.origin}: {len(gathered)} tokens, at least {_LEAST_TOKENS} are needed")
    ids = np.asarray(gathered[:tokens], np.int64)
    for start in range(0, len(ids), room):
        yield ids[start : start + room]


def _difference(old: OrtDecoder, new: OrtDecoder, texts: Sequence[Ids], progress: Progress) -> tuple[float, float]:
    """(KL in nats per token, share of tokens with the same likeliest successor) of the new decoder from the old one."""
    divergence, agreed, count = 0.0, 0, 0
    for done, ids in enumerate(texts):
        progress("measuring its cost", done, len(texts))
        for a, b in zip(old.logits_chunks(ids), new.logits_chunks(ids), strict=True):
            p, q = _log_softmax(a), _log_softmax(b)
            divergence += float((np.exp(p) * (p - q)).sum())
            agreed += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
            count += len(p)
    progress("measuring its cost", len(texts), len(texts))
    return divergence / count, agreed / count


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    normal: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normal


def _copy(source: Path, target: Path) -> None:
    """Plain files only: what a link points to is not part of the artifact."""
    for path in sorted(source.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path}: a link or special file; an artifact holds plain files")
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir()
        else:
            shutil.copyfile(path, place)


def _update_manifest(stage: Path, file: str, made: Int8Cache) -> None:
    """The changed file's hash and what the cache costs. Quality was measured with another cache: it goes."""
    path = stage / MANIFEST_NAME
    if not path.is_file():  # another tool's export
        return
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{path}: not an edgec manifest")
    with (stage / file).open("rb") as content:
        manifest["files"][file] = hashlib.file_digest(content, "sha256").hexdigest()
    told: dict[str, Any] = {k: v for k, v in asdict(made).items() if k != "out"}
    manifest |= {"kv_cache": {"type": "int8", **told}, "quality": {}}
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
