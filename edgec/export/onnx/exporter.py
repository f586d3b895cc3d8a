"""From a dense transformers folder and fitted factors to a folder that onnxruntime or onnxruntime-genai loads as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Set
from pathlib import Path

import onnx_ir as ir

from edgec import modeling
from edgec.checkpoint import Checkpoint
from edgec.companions import copy_companions
from edgec.export.artifacts import Written
from edgec.export.onnx import decoder
from edgec.export.onnx.decoder_support import check_supported
from edgec.export.onnx.encoder import export_encoder
from edgec.export.onnx.graph import DenseGraph
from edgec.export.onnx.lowering import lower
from edgec.export.onnx.projections import pack_projections
from edgec.export.onnx.saving import DATA_FILE, MODEL_FILE, save_model
from edgec.fit import Factors
from edgec.pooling import read_pooling
from edgec.records import Target

_NODE_BYTES = 420
"""Typical size of one node in model.onnx with its names [bytes]; only a first guess, the written file is what counts.
"""


def refuse_unsupported(checkpoint: Checkpoint, task: str) -> None:
    """Raises UnsupportedModelError, before any work, for what the runtime cannot execute."""
    if task == modeling.DECODER_TASK:
        check_supported(modeling.hf_config(checkpoint))


def dense_graph(checkpoint: Checkpoint, task: str, work: Path) -> DenseGraph:
    """The dense fp32 graph in memory. work: an existing folder for a few kB of temporary files."""
    if task == modeling.DECODER_TASK:
        return decoder.build_decoder(checkpoint.folder, work)
    pooling = read_pooling(checkpoint.folder)
    return export_encoder(modeling.load_dense(checkpoint), task, pooling=pooling)


def other_bytes(graph: DenseGraph, planned: Set[str]) -> int:
    """Bytes of the model file beside the planned layers: norms, biases, tables, and the graph itself (estimated)."""
    nodes = [node for name, node in [*graph.linears.items(), *graph.embeddings.items()] if name in planned]
    weights = {
        id(value) for node in nodes for value in node.inputs if value is not None and value.const_value is not None
    }
    model = graph.model.graph
    tensors = [v.const_value for v in model.initializers.values() if id(v) not in weights and v.const_value is not None]
    return sum(t.nbytes for t in tensors) + _NODE_BYTES * (len(model) + 4 * len(nodes))


def write_model(
    graph: DenseGraph,
    factors: Mapping[str, Factors],
    target: Target,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Lower the factors into the graph (which is consumed) and write model.onnx and its data into the existing folder
    `out`.
    """
    decodes = isinstance(graph, decoder.DecoderGraph)
    int8 = target.multiplies_in_int8(encoder=not decodes)
    lower(graph, factors, accuracy_level=target.accuracy_level, int8=int8)
    if isinstance(graph, decoder.DecoderGraph):
        pack_projections(graph.model)
        if graph.tied and not {graph.head, graph.embedding} & set(factors):
            decoder.share_tied_table(graph)
    _stamp(graph.model)
    tensors = save_model(graph.model, out, progress)
    files = [out / MODEL_FILE, out / DATA_FILE]
    return Written(sum(f.stat().st_size for f in files if f.exists()), tensors)


def write_companions(checkpoint: Checkpoint, graph: DenseGraph | None, out: Path) -> int:
    """Tokenizer, chat template, configuration: what the runtime needs beside the model. Returns their bytes."""
    before = _size(out)
    if isinstance(graph, decoder.DecoderGraph):
        decoder.write_runtime_files(graph, out)
    else:
        copy_companions(checkpoint.folder, out)
    config = {k: v for k, v in checkpoint.config.items() if k not in ("edgec", "auto_map", "_name_or_path")}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return _size(out) - before


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _stamp(model: ir.Model) -> None:
    """The file says who made it; versions are in edgec.json, so that equal inputs give equal bytes."""
    model.producer_name, model.producer_version = "edgec", ""
