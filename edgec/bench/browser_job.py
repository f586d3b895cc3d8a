"""Turns a job into what the page needs: token ids, the graph's own names and types, the files to serve.

Everything is read here, on the host, by the browser device: the page gets numbers and file names and has no tokenizer
and no ONNX reader. Not among the devices, because those import nothing that a device lacks, and this reads a graph.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgec import limits
from edgec.bench import check
from edgec.bench.jobs import Job
from edgec.errors import BenchError, CheckpointError
from edgec.runtime.interfaces import CAUSAL_LM, ENCODER
from edgec.runtime.layout import inside, read_json, whole_number
from edgec.runtime.ort_encoder import HIDDEN_OUTPUT, SENTENCE_OUTPUT, open_tokenizer

_INTEGERS = {6: "int32", 7: "int64"}
_FLOATS = {1: "float32", 10: "float16"}
_SINGLES = 8


@dataclass(frozen=True)
class PageJob:
    """record: job.json. files: paths below the page's folder (of ours, whatever the artifact's names) → files."""

    record: dict[str, Any]
    files: dict[str, Path]


@dataclass(frozen=True)
class _Graph:
    """An ONNX file's signature: name → ONNX element type. files: the graph first, then its weights by their names."""

    inputs: dict[str, int]
    outputs: tuple[str, ...]
    files: dict[str, Path]


def page_job(job: Job) -> PageJob:
    """Raises CheckpointError for a damaged artifact, BenchError for one that is not for onnxruntime."""
    folder = Path(job.folder)
    build = {ENCODER: _encoder, CAUSAL_LM: _decoder}.get(job.task)
    if build is None or any(folder.glob("*.gguf")):
        raise BenchError(f"{folder.name}: a browser runs ONNX artifacts only (onnxruntime-web)")
    record, graph = build(folder, job)
    shared = {
        "task": job.task,
        "threads": job.threads,
        "warmup": job.warmup,
        "samples": job.samples,
        "min_sample_s": job.min_sample_s,
    }
    served = {f"model/{i}": path for i, path in enumerate(graph.files.values())}
    urls = list(served)
    external = [{"path": name, "url": url} for name, url in zip(graph.files, urls, strict=True)][1:]
    return PageJob({**shared, **record, "model": urls[0], "external": external}, served)


def _encoder(folder: Path, job: Job) -> tuple[dict[str, Any], _Graph]:
    graph = _graph(folder, "model.onnx")
    tokenizer = open_tokenizer(folder)
    output = next((name for name in (SENTENCE_OUTPUT, HIDDEN_OUTPUT) if name in graph.outputs), "")
    known = {"input_ids", "attention_mask", "token_type_ids"}
    if not output or not set(graph.inputs) <= known:
        raise BenchError(f"{folder.name}: a graph with inputs {sorted(graph.inputs)} is no encoder for the browser")
    if not job.sentences:
        raise BenchError("an encoder's job needs sentences")

    def batch(sentences: Sequence[str]) -> dict[str, Any]:
        encoded = tokenizer.encode_batch(list(sentences))
        return {
            "shape": [len(encoded), len(encoded[0].ids)],
            "input_ids": [i for e in encoded for i in e.ids],
            "attention_mask": [i for e in encoded for i in e.attention_mask],
            "token_type_ids": [i for e in encoded for i in e.type_ids],
        }

    whole = batch(job.sentences)
    record = {
        "inputs": {name: _named(_INTEGERS, kind, name, folder) for name, kind in graph.inputs.items()},
        "output": output,
        "pool": output == HIDDEN_OUTPUT,
        "batch": whole,
        "singles": [batch([sentence]) for sentence in job.sentences[:_SINGLES]],
        "sentence_tokens": sum(whole["attention_mask"]) / len(job.sentences),
        "check": batch(job.sentences[: check.SENTENCES]),
    }
    return record, graph


def _decoder(folder: Path, job: Job) -> tuple[dict[str, Any], _Graph]:
    path = folder / "genai_config.json"
    model = read_json(path).get("model")
    try:
        decoder = dict(model["decoder"])  # type: ignore[index]
        inputs, outputs = dict(decoder["inputs"]), dict(decoder["outputs"])
        layers = whole_number(decoder, "num_hidden_layers", path, high=limits.MAX_LAYERS)
        places = (("past", inputs), ("present", outputs))
        pairs = [
            [str(names[f"{when}_{part}_names"]).replace("%d", str(i)) for when, names in places]
            for i in range(layers)
            for part in ("key", "value")
        ]
        ends = model["eos_token_id"]  # type: ignore[index]
        ends = [int(e) for e in (ends if isinstance(ends, list) else [ends])]
        names = {"ids": str(inputs["input_ids"]), "logits": str(outputs["logits"])}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a decoder with a cache: {error!r}") from error
    graph = _graph(folder, decoder.get("filename", "model.onnx"))
    for role, name in (("mask", inputs.get("attention_mask")), ("positions", inputs.get("position_ids"))):
        names[role] = str(name) if name in graph.inputs else ""
    integers = [name for role, name in names.items() if name and role != "logits"]
    caches = {graph.inputs.get(past) for past, _ in pairs}
    if unknown := sorted(set(graph.inputs) - set(integers) - {past for past, _ in pairs}):
        raise BenchError(f"{folder.name}: the browser has no value for the input {unknown[0]!r}")
    if len(caches) != 1 or None in caches:
        raise BenchError(f"{folder.name}: the graph lacks a cache input that genai_config.json names")
    vocabulary = whole_number(model, "vocab_size", path)  # type: ignore[arg-type]
    context = whole_number(model, "context_length", path)  # type: ignore[arg-type]
    if job.prompt_tokens + job.new_tokens > context:
        raise BenchError(
            f"{job.prompt_tokens} prompt tokens and {job.new_tokens} new ones do not fit the context of {context}"
        )
    record = {
        "inputs": {name: _named(_INTEGERS, graph.inputs[name], name, folder) for name in integers},
        "names": names,
        "cache": {
            "type": _named(_FLOATS, next(iter(caches)) or 0, pairs[0][0], folder),
            "shape": [
                1,
                whole_number(decoder, "num_key_value_heads", path),
                0,
                whole_number(decoder, "head_size", path),
            ],
            "pairs": pairs,
        },
        "ends": ends,
        "prompt": _ids(job.seed, vocabulary, job.prompt_tokens),
        "new_tokens": job.new_tokens,
        "check": _ids(job.seed, vocabulary, min(check.TOKENS, context)),
        "check_rows": check.ROWS,
    }
    return record, graph


def _ids(seed: int, vocabulary: int, count: int) -> list[int]:
    """The prompt that `edgec.bench.worker` and `edgec.bench.check` make of this seed."""
    chooser = random.Random(seed)  # noqa: S311 - reproducible, not secret
    return [chooser.randrange(vocabulary) for _ in range(count)]


def _graph(folder: Path, name: str) -> _Graph:
    """Raises CheckpointError where the file is no ONNX model or names files outside the folder."""
    import onnx

    path = inside(folder, name, folder)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, ValueError and more, depending on what is broken
        raise CheckpointError(f"{path} is no ONNX model: {error}") from error
    weights = {t.name for t in model.graph.initializer}
    external = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    return _Graph(
        {i.name: i.type.tensor_type.elem_type for i in model.graph.input if i.name not in weights},
        tuple(o.name for o in model.graph.output),
        {name: path, **{other: inside(folder, other, path) for other in sorted(external)}},
    )


def _named(types: dict[int, str], kind: int, name: str, folder: Path) -> str:
    if kind not in types:
        raise BenchError(f"{folder.name}: the input {name!r} has ONNX type {kind}; expected {sorted(types.values())}")
    return types[kind]
