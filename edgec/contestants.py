"""Who an artifact is measured against: dense peers made by other people's tools, and models of a shape without weights.

A room of its own between `pipeline` and `assess`, because making a contestant needs exports (a baseline's source), and
judging it needs none of this.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from edgec import pipeline, random_gguf, subprocesses
from edgec.bench import baselines, shapes
from edgec.bench.harness import Contestant
from edgec.errors import BenchError, UsageError
from edgec.export.gguf import stock
from edgec.export.gguf.plain import write_plain
from edgec.export.targets import get_target
from edgec.modeling import ENCODER_TASK
from edgec.runtime.interfaces import CAUSAL_LM, ENCODER
from edgec.workspace import Workspace

FP32 = "fp32"
"""edgec's own dense export of an encoder: the source of its baselines, and one itself."""

_EXPORT_TIMEOUT_S = 3600
_RANDOM = "random weights: speed only"
_MAKERS = dict.fromkeys(("int4", "int8", "fp32"), " (genai builder)")


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


def smaller(
    workspace: Workspace, model: Path, kind: str, work: Path, progress: pipeline.Progress
) -> tuple[Contestant, Workspace]:
    """A smaller dense model in place of a compressed one, as one baseline's tool ships it; and its own workspace.

    kind: a baseline, "" for the one that loses next to nothing: int8 for an encoder, int4 for a causal LM. Raises
    UsageError for a model that does something else or is not smaller.
    """
    other = Workspace(model, workspace.calibration_file)
    if other.task != workspace.task:
        raise UsageError(f"--smaller {model} does {other.task}, {workspace.folder} does {workspace.task}")
    mine, its = workspace.checkpoint.parameters, other.checkpoint.parameters
    if its >= mine:
        raise UsageError(f"--smaller {model} has {its:,} parameters, and {workspace.folder} has {mine:,}")
    name = kind or ("int8" if other.task == ENCODER_TASK else "int4")
    (made,) = peers(other, [name], work, progress, prefix=f"smaller {model.resolve().name}")
    note = f"another model: {its / 1e6:.1f} M parameters instead of {mine / 1e6:.1f} M"
    return replace(made, notes=(note, *made.notes)), other


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
    stock.refuse_unsupported(workspace.checkpoint, workspace.task)
    return write_plain(workspace.checkpoint, out, partial(progress, "dense GGUF"))


_SOURCES: Mapping[str, Callable[[Workspace, Path, pipeline.Progress], Path]] = {
    baselines.CHECKPOINT: _checkpoint,
    baselines.DENSE_ONNX: _dense_onnx,
    baselines.DENSE_GGUF: _dense_gguf,
}


@dataclass(frozen=True)
class ShapeRequest:
    """Random weights of a named shape, for speed. plan: a constraint, exported to every one of `targets`.

    peers: dense baselines of causal LMs by name.
    """

    name: str
    plan: str = "uniform:0.5"
    targets: tuple[str, ...] = ("onnx-x64",)
    peers: tuple[str, ...] = ("int4",)


def of_shape(
    request: ShapeRequest, work: Path, progress: pipeline.Progress
) -> tuple[list[Contestant], list[ExportCost]]:
    """edgec's exports of a constraint, and dense peers of the same shape.

    GGUF files get random blocks (`random_gguf`); ONNX graphs are exported and quantised, which takes minutes. What
    `work` already holds from an earlier run is measured again, not made again (and then has no ExportCost).
    Raises UsageError for an unknown shape, target or baseline, before anything is made.
    """
    shape = shapes.get(request.name)
    if odd := [t for t in request.targets if not t.startswith("onnx-") and t != random_gguf.TARGET]:
        raise UsageError(f"--shape exports to an ONNX target or to {random_gguf.TARGET}, not to {odd[0]!r}")
    for name in request.targets:
        get_target(name)
    for name in request.peers:
        baselines.require(name, CAUSAL_LM)
    model, costs, found = work / request.name, [], []
    _unless_there(model, f"writing {request.name}", lambda: shapes.write(shape, model), progress)
    for target in request.targets:
        out = work / f"{request.name}-{_slug(request.plan)}-{target}"
        label = f"edgec {request.plan}" + (f" ({target})" if len(request.targets) > 1 else "")
        if target == random_gguf.TARGET:
            _unless_there(out, label, partial(random_gguf.write_factored, model, request.plan, out), progress)
        elif not out.exists():
            progress(label, 0, 1)
            costs.append(_export_in_a_process(model, out, request.plan, target))
            progress(label, 1, 1)
        found.append(Contestant(label, out, CAUSAL_LM, notes=(_RANDOM,)))
    for name in request.peers:
        baseline = baselines.get(name, CAUSAL_LM)
        out = work / f"{request.name}-dense-{name}"
        if baseline.SOURCE == baselines.DENSE_GGUF:
            label = f"dense {name} (llama.cpp)"
            make: Callable[[], Path] = partial(random_gguf.write_quantised, shape, model, name.upper(), out)
        else:
            label = f"dense {name}{_MAKERS.get(name, '')}"
            make = partial(baselines.make, name, CAUSAL_LM, model, out)
        _unless_there(out, label, make, progress)
        found.append(Contestant(label, out, CAUSAL_LM, notes=(_RANDOM, *baselines.notes(name, CAUSAL_LM, out))))
    return found, costs


def _unless_there(out: Path, stage: str, make: Callable[[], object], progress: pipeline.Progress) -> None:
    if not out.exists():
        progress(stage[:40], 0, 1)
        make()
        progress(stage[:40], 1, 1)


def _export_in_a_process(model: Path, out: Path, plan: str, target: str) -> ExportCost:
    """The export as a user would run it, in a process of its own, so that its peak memory is its own too."""
    argv = [sys.executable, "-m", "edgec", "export", str(model), "--target", target, "--plan", plan]
    argv += ["--plain", "--no-quality", "-o", str(out), "--json", "--force"]
    finished = subprocesses.run(argv, timeout_s=_EXPORT_TIMEOUT_S)
    if not finished.ok:
        raise BenchError(f"exporting {model.name} failed: {finished.reason()}")
    answer = json.loads(finished.stdout.splitlines()[-1])
    return ExportCost(out.name, float(answer["seconds"]), int(answer["peak_rss_bytes"]))
