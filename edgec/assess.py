"""Judging finished artifacts: their quality against the dense model, and their speed and memory against dense
baselines.

Ordered here, beside `pipeline`, because a comparison needs exports (baselines), evaluation and the bench in one run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgec import pipeline, subprocesses
from edgec.bench import baselines, shapes
from edgec.bench.harness import BenchSettings, Contestant, run_bench
from edgec.checkpoint import read_json
from edgec.errors import BenchError, CheckpointError, UsageError
from edgec.evaluate.embeddings import (
    Pairs,
    pair_similarities,
    read_sts,
    spearman,
    spearman_loss_interval,
    torch_embedder,
)
from edgec.modeling import ENCODER_TASK
from edgec.records import MANIFEST_NAME, Measurement
from edgec.runtime.interfaces import CAUSAL_LM, ENCODER
from edgec.runtime.ort_encoder import OrtEncoder
from edgec.workspace import Workspace

_EXPORT_TIMEOUT_S = 3600


@dataclass(frozen=True)
class BenchRequest:
    """What `edgec bench` was asked for.

    model: the dense checkpoint, needed for baselines and quality. work: where baselines are built.
    """

    artifacts: tuple[Path, ...]
    settings: BenchSettings
    work: Path
    model: Path | None = None
    baselines: tuple[str, ...] = ()
    sts: Path | None = None
    calibration: Path | None = None


@dataclass(frozen=True)
class ExportCost:
    """What making one artifact took: wall seconds and the peak RSS of its process [bytes]."""

    name: str
    seconds: float
    peak_rss_bytes: int


def evaluate(
    artifact: Path, model: Path, *, sts: Path | None = None, calibration: Path | None = None
) -> dict[str, Any]:
    """Quality of an exported folder against its dense model, on held-out text; with an STS file also Spearman and its
    interval.
    """
    workspace = Workspace(model, calibration)
    _require_same_model(artifact, workspace)
    result = pipeline.measure_quality(workspace, artifact)
    if sts is not None:
        result.update(_sts_quality(workspace, artifact, read_sts(sts)))
    return result


def _require_same_model(artifact: Path, workspace: Workspace) -> None:
    """A divergence from another model than the one compressed means nothing. Raises CheckpointError."""
    manifest = read_json(artifact / MANIFEST_NAME) if (artifact / MANIFEST_NAME).is_file() else {}
    made_from = manifest.get("fingerprint") if isinstance(manifest, dict) else None
    if made_from is not None and made_from != workspace.checkpoint.fingerprint:
        raise CheckpointError(
            f"{artifact} was made from {str(made_from)[:19]}…, {workspace.folder} is "
            f"{workspace.checkpoint.fingerprint[:19]}…; give the model that it was exported from"
        )


def _sts_quality(workspace: Workspace, artifact: Path, pairs: Pairs) -> dict[str, float]:
    if workspace.pooling is None:
        raise UsageError(f"--sts measures sentence encoders; {workspace.folder} is a causal LM")
    dense = pair_similarities(
        torch_embedder(workspace.model, workspace.tokenizer, workspace.pooling, max_tokens=workspace.context), pairs
    )
    other = pair_similarities(OrtEncoder(artifact).embed, pairs)
    loss, low, high = spearman_loss_interval(dense, other, pairs.scores)
    return {
        "spearman": spearman(other, pairs.scores),
        "spearman_dense": spearman(dense, pairs.scores),
        "spearman_loss": loss,
        "spearman_loss_low": low,
        "spearman_loss_high": high,
    }


def bench(request: BenchRequest, progress: pipeline.Progress) -> list[Measurement]:
    """Measure artifacts and baselines interleaved in one run; with a model, quality stands beside speed."""
    contestants = [Contestant(path.name, path) for path in request.artifacts]
    if request.baselines:
        if request.model is None:
            raise UsageError("--baseline needs --model: the dense checkpoint that the baselines are made from")
        contestants += _baselines(request, progress)
    if request.model is not None:
        workspace = Workspace(request.model, request.calibration)
        contestants = [
            replace(c, quality=_quality(workspace, c, request.sts)) for c in _shown(contestants, "quality", progress)
        ]
    return run_bench(
        contestants, request.settings, lambda done, total, text: progress(f"bench {text}"[:40], done, total)
    )


def _shown(contestants: Sequence[Contestant], stage: str, progress: pipeline.Progress) -> Iterator[Contestant]:
    for done, contestant in enumerate(contestants):
        progress(f"{stage} {contestant.name}"[:40], done, len(contestants))
        yield contestant


def _quality(workspace: Workspace, contestant: Contestant, sts: Path | None) -> dict[str, float]:
    _require_same_model(contestant.folder, workspace)
    found = pipeline.measure_quality(workspace, contestant.folder)
    keys = ("cosine",) if workspace.task == ENCODER_TASK else ("kl", "perplexity_ratio", "top1")
    quality = {key: float(found[key]) for key in keys}
    if sts is not None:
        measured = _sts_quality(workspace, contestant.folder, read_sts(sts))
        quality |= {
            key: measured[key] for key in ("spearman", "spearman_loss", "spearman_loss_low", "spearman_loss_high")
        }
    return quality


def _baselines(request: BenchRequest, progress: pipeline.Progress) -> list[Contestant]:
    """Dense peers made by other people's tools, from edgec's own dense fp32 export (encoders) or the checkpoint (causal
    LMs).
    """
    assert request.model is not None
    encoder = Workspace(request.model).task == ENCODER_TASK
    known = {"fp32", *baselines.names(ENCODER)} if encoder else set(baselines.names(CAUSAL_LM))
    if unknown := sorted(set(request.baselines) - known):
        raise UsageError(f"unknown baseline {unknown[0]!r}; known for this model: {', '.join(sorted(known))}")
    made: list[Contestant] = []
    dense = request.work / "dense-fp32"
    if encoder:
        pipeline.export(
            pipeline.ExportRequest(request.model, "onnx-x64", dense, plan="dense:fp32", plain=True), progress
        )
    for done, name in enumerate(request.baselines):
        progress("baselines", done, len(request.baselines))
        if encoder and name == "fp32":
            made.append(Contestant("dense fp32", dense, ENCODER))
            continue
        out = request.work / f"dense-{name}"
        baselines.make(name, ENCODER if encoder else CAUSAL_LM, dense if encoder else request.model, out)
        made.append(Contestant(f"dense {name}", out))
    progress("baselines", len(request.baselines), len(request.baselines))
    return made


def bench_shape(
    name: str, plan: str, settings: BenchSettings, work: Path, progress: pipeline.Progress
) -> tuple[list[Measurement], list[ExportCost]]:
    """Speed on a named random-weight shape: edgec's export of a constraint against the genai builder's dense int4.

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
    rows = run_bench(contestants, settings, lambda done, total, text: progress(f"bench {text}"[:40], done, total))
    return rows, costs


def _export_in_a_process(model: Path, out: Path, plan: str) -> ExportCost:
    """The export as a user would run it, in a process of its own, so that its peak memory is its own too."""
    argv = [sys.executable, "-m", "edgec", "export", str(model), "--target", "onnx-x64", "--plan", plan]
    argv += ["--plain", "--no-quality", "-o", str(out), "--json", "--force"]
    finished = subprocesses.run(argv, timeout_s=_EXPORT_TIMEOUT_S)
    if not finished.ok:
        raise BenchError(f"exporting {model.name} failed: {finished.reason()}")
    answer = json.loads(finished.stdout.splitlines()[-1])
    return ExportCost(out.name, float(answer["seconds"]), int(answer["peak_rss_bytes"]))
