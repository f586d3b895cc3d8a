"""Who an artifact is measured against: dense peers made by other people's tools, and models of a shape without weights.

A room of its own between `pipeline` and `assess`, because making a contestant needs exports (a baseline's source), and
judging it needs none of this.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgec import pipeline, subprocesses
from edgec.bench import baselines, shapes
from edgec.bench.harness import Contestant
from edgec.errors import BenchError, UsageError
from edgec.export.gguf import stock
from edgec.export.gguf.writer import write_gguf
from edgec.modeling import ENCODER_TASK
from edgec.outputs import staged_folder
from edgec.runtime.interfaces import CAUSAL_LM, ENCODER
from edgec.runtime.llama_cpp import MODEL_FILE
from edgec.workspace import Workspace

FP32 = "fp32"
"""edgec's own dense export of an encoder: the source of its baselines, and one itself."""

_EXPORT_TIMEOUT_S = 3600


@dataclass(frozen=True)
class ExportCost:
    """What making one artifact took: wall seconds and the peak RSS of its process [bytes]."""

    name: str
    seconds: float
    peak_rss_bytes: int


def baseline_names(task: str) -> tuple[str, ...]:
    """What `peers` can be asked for."""
    own = (FP32,) if task == ENCODER else ()
    return tuple(sorted({*own, *baselines.names(task)}))


def peers(
    workspace: Workspace, names: Sequence[str], work: Path, progress: pipeline.Progress, *, prefix: str = "dense"
) -> list[Contestant]:
    """Dense contestants of a model, made in the folder `work`. prefix: of their names, "dense q4_0", and folders.

    Raises UsageError for an unknown name and RuntimeUnavailableError for a missing tool, both before anything is made.
    """
    task = ENCODER if workspace.task == ENCODER_TASK else CAUSAL_LM
    if unknown := sorted(set(names) - set(baseline_names(task))):
        raise UsageError(f"unknown baseline {unknown[0]!r}; known for this model: {', '.join(baseline_names(task))}")
    for name in names:
        if not _own(name, task):
            baselines.require(name, task)

    @cache
    def source(kind: str) -> Path:
        return _SOURCES[kind](workspace, work / f"{_slug(prefix)}-{kind.removeprefix('dense-')}-source", progress)

    made: list[Contestant] = []
    for done, name in enumerate(names):
        progress("baselines", done, len(names))
        if _own(name, task):
            made.append(Contestant(f"{prefix} {name}", source(baselines.DENSE_ONNX), task))
            continue
        out = work / f"{_slug(prefix)}-{name}"
        baselines.make(name, task, source(baselines.get(name, task).SOURCE), out)
        made.append(Contestant(f"{prefix} {name}", out, task, notes=baselines.notes(name, task, out)))
    progress("baselines", len(names), len(names))
    return made


def _own(name: str, task: str) -> bool:
    return (name, task) == (FP32, ENCODER)


def _slug(text: str) -> str:
    """A name as part of a file name."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text)[:80]


def _checkpoint(workspace: Workspace, out: Path, progress: pipeline.Progress) -> Path:
    return workspace.folder


def _dense_onnx(workspace: Workspace, out: Path, progress: pipeline.Progress) -> Path:
    request = pipeline.ExportRequest(workspace.folder, "onnx-x64", out, plan="dense:fp32", plain=True, quality=False)
    pipeline.export(request, progress)
    return out


def _dense_gguf(workspace: Workspace, out: Path, progress: pipeline.Progress) -> Path:
    """The checkpoint as llama.cpp's own converter would write it: matrices in F16, vectors in F32."""
    stock.refuse_unsupported(workspace.checkpoint, workspace.task)
    draft = stock.draft(workspace.checkpoint)
    with staged_folder(out) as stage:
        tensors = stock.tensors(draft, {})
        write_gguf(stage / MODEL_FILE, draft.metadata, tensors, lambda done, all_: progress("dense GGUF", done, all_))
    return out


_SOURCES: Mapping[str, Callable[[Workspace, Path, pipeline.Progress], Path]] = {
    baselines.CHECKPOINT: _checkpoint,
    baselines.DENSE_ONNX: _dense_onnx,
    baselines.DENSE_GGUF: _dense_gguf,
}


def of_shape(
    name: str, plan: str, work: Path, progress: pipeline.Progress
) -> tuple[list[Contestant], list[ExportCost]]:
    """A named random-weight shape: edgec's export of a constraint against the genai builder's dense int4.

    What `work` already holds from an earlier run is measured again, not made again (and then has no ExportCost).
    """
    model = work / name
    if not model.exists():
        progress(f"writing {name}", 0, 1)
        shapes.write(name, model)
        progress(f"writing {name}", 1, 1)
    factored, dense = work / f"{name}-edgec", work / f"{name}-dense-int4"
    costs = []
    if not factored.exists():
        progress("exporting with edgec", 0, 1)
        costs.append(_export_in_a_process(model, factored, plan))
        progress("exporting with edgec", 1, 1)
    if not dense.exists():
        progress("exporting dense int4", 0, 1)
        baselines.make("int4", CAUSAL_LM, model, dense)
        progress("exporting dense int4", 1, 1)
    contestants = [
        Contestant(f"edgec {plan}", factored, CAUSAL_LM),
        Contestant("dense int4 (genai builder)", dense, CAUSAL_LM),
    ]
    return contestants, costs


def _export_in_a_process(model: Path, out: Path, plan: str) -> ExportCost:
    """The export as a user would run it, in a process of its own, so that its peak memory is its own too."""
    argv = [sys.executable, "-m", "edgec", "export", str(model), "--target", "onnx-x64", "--plan", plan]
    argv += ["--plain", "--no-quality", "-o", str(out), "--json", "--force"]
    finished = subprocesses.run(argv, timeout_s=_EXPORT_TIMEOUT_S)
    if not finished.ok:
        raise BenchError(f"exporting {model.name} failed: {finished.reason()}")
    answer = json.loads(finished.stdout.splitlines()[-1])
    return ExportCost(out.name, float(answer["seconds"]), int(answer["peak_rss_bytes"]))
