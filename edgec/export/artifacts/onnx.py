"""model.onnx with its data and the runtime's files: for onnxruntime and onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from pathlib import Path

import transformers

from edgec.calibration import Batches
from edgec.checkpoint import Checkpoint
from edgec.export import verify
from edgec.export.artifacts import Written
from edgec.export.onnx import exporter
from edgec.export.onnx.graph import DenseGraph
from edgec.fit import Factors
from edgec.records import Target

PLUGIN = True
RECONSTRUCTS = False
PACKAGES = ("onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai")


def refuse_unsupported(checkpoint: Checkpoint, task: str) -> None:
    exporter.refuse_unsupported(checkpoint, task)


def prepare(checkpoint: Checkpoint, task: str, work: Path) -> DenseGraph:
    return exporter.dense_graph(checkpoint, task, work)


def other_bytes(draft: DenseGraph, planned: Set[str]) -> int:
    return exporter.other_bytes(draft, planned)


def write(
    draft: DenseGraph,
    factors: Mapping[str, Factors],
    target: Target,
    out: Path,
    progress: Callable[[int, int], None],
) -> Written:
    return exporter.write_model(draft, factors, target, out, progress)


def write_companions(checkpoint: Checkpoint, draft: DenseGraph, out: Path) -> int:
    return exporter.write_companions(checkpoint, draft, out)


def parity(
    folder: Path, reference: transformers.PreTrainedModel, task: str, batches: Batches, work: Path
) -> verify.Parity:
    return verify.verify_parity(folder, reference, task, batches)
