"""Judging finished artifacts: their quality against the dense model, and their speed and memory against dense
baselines.

Ordered here, beside `pipeline`, because a comparison needs exports (baselines), evaluation and the bench in one run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgec import pipeline
from edgec.bench.devices import Device, open_device
from edgec.bench.harness import BenchSettings, Contestant, check_names, run_bench
from edgec.bench.worker import loader_of, tool_of
from edgec.calibration import DECODER_LENGTH
from edgec.checkpoint import open_checkpoint
from edgec.contestants import ExportCost, ShapeRequest, of_shape, peers, smaller
from edgec.errors import CheckpointError, UsageError
from edgec.evaluate.embeddings import (
    Pairs,
    pair_similarities,
    read_sts,
    spearman,
    spearman_loss_interval,
    torch_embedder,
)
from edgec.evaluate.per_byte import bits_per_byte, pieces
from edgec.export import verify
from edgec.inspection import manifest_of
from edgec.modeling import ENCODER_TASK, task_of
from edgec.plan import hardware
from edgec.records import Measurement
from edgec.runtime.artifact import open_artifact
from edgec.runtime.interfaces import CAUSAL_LM, ENCODER
from edgec.runtime.layout import is_compressed
from edgec.runtime.options import RuntimeOptions
from edgec.runtime.ort_encoder import OrtEncoder
from edgec.workspace import Workspace

_IN_TORCH = "not exported: its layers are factored in torch and its cores unpacked to floats"


@dataclass(frozen=True)
class BenchRequest:
    """What `edgec bench` was asked for.

    model: the dense checkpoint, needed for baselines and quality. work: where baselines are built. smaller: checkpoints
    of smaller models to stand beside the artifacts, in the form that the baseline `smaller_as` has ("": see
    `contestants.smaller`). kv_caches: types of KV cache that every GGUF artifact is measured with.
    """

    artifacts: tuple[Path, ...]
    settings: BenchSettings
    work: Path
    model: Path | None = None
    baselines: tuple[str, ...] = ()
    sts: Path | None = None
    calibration: Path | None = None
    smaller: tuple[Path, ...] = ()
    smaller_as: str = ""
    kv_caches: tuple[str, ...] = ()


def evaluate(
    artifact: Path, model: Path, *, sts: Path | None = None, calibration: Path | None = None, kv_cache: str = ""
) -> dict[str, Any]:
    """Quality of an exported folder against its dense model, on held-out text; with an STS file also Spearman and its
    interval. kv_cache: see RuntimeOptions.
    """
    opened = _opened(artifact, kv_cache)
    workspace = Workspace(model, calibration)
    _require_same_model(artifact, workspace)
    result = pipeline.measure_quality(workspace, artifact, opened)
    if sts is not None:
        result.update(_sts_quality(workspace, artifact, read_sts(sts)))
    return result


def _require_same_model(artifact: Path, workspace: Workspace) -> None:
    """A divergence from another model than the one compressed means nothing. Raises CheckpointError."""
    made_from = manifest_of(artifact).get("fingerprint")
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
    other = pair_similarities((_opened_peer(artifact) or OrtEncoder(artifact)).embed, pairs)
    loss, low, high = spearman_loss_interval(dense, other, pairs.scores)
    return {
        "spearman": spearman(other, pairs.scores),
        "spearman_dense": spearman(dense, pairs.scores),
        "spearman_loss": loss,
        "spearman_loss_low": low,
        "spearman_loss_high": high,
    }


def bench(request: BenchRequest, progress: pipeline.Progress, device: Device | None = None) -> list[Measurement]:
    """Measure artifacts, baselines and smaller models interleaved in one run; with a model, quality stands beside
    speed. device: an open one, instead of the settings' own.

    What can be refused is refused before baselines are built, which takes minutes: an unknown or unreachable device,
    two contestants of one name.
    """
    device = device or open_device(request.settings.device)
    machine = " ".join(device.describe().values())
    contestants = [found for path in request.artifacts for found in _entrants(path, request.kv_caches, machine)]
    check_names(contestants)
    if request.kv_caches and not any(found.kv_cache for found in contestants):
        raise UsageError("--kv-cache is for GGUF artifacts, and none is given; ONNX graphs state the type of theirs")
    if request.model is None:
        if request.baselines or request.smaller:
            raise UsageError("--baseline and --smaller need --model: the dense checkpoint that they stand beside")
    else:
        workspace = Workspace(request.model, request.calibration)
        contestants += peers(workspace, request.baselines, request.work, progress)
        others = [smaller(workspace, m, request.smaller_as, request.work, progress) for m in request.smaller]
        pairs = read_sts(request.sts) if request.sts is not None else None
        texts = pieces(workspace.text.split("validate").items) if others and workspace.pooling is None else ()
        contestants = [_judged(workspace, c, pairs, texts) for c in _shown(contestants, "quality", progress)]
        contestants += [_judged_alone(workspace, c, own, pairs, texts) for c, own in others]
    return run_bench(
        contestants, request.settings, lambda done, total, text: progress(f"bench {text}"[:40], done, total), device
    )


def _entrants(path: Path, kv_caches: Sequence[str], machine: str) -> list[Contestant]:
    """An artifact, once per type of KV cache where its runtime lets one choose. machine: what measures it."""
    target = str(manifest_of(path).get("target", ""))
    notes: tuple[str, ...] = ()
    if hardware.misplaced(target, machine):
        notes = (f"exported for {target}, measured on another kind of processor",)
    if is_compressed(path):
        task = ENCODER if task_of(open_checkpoint(path)) == ENCODER_TASK else CAUSAL_LM
        return [Contestant(path.name, path, task, notes=(*notes, _IN_TORCH))]
    plain = Contestant(path.name, path, notes=notes)
    if not kv_caches or not plain.is_gguf:
        return [plain]
    chosen = [RuntimeOptions(kv_cache=kind).kv_cache for kind in dict.fromkeys(kv_caches)]
    return [Contestant(f"{path.name} (KV {kind})", path, kv_cache=kind, notes=notes) for kind in chosen]


def _shown(contestants: Sequence[Contestant], stage: str, progress: pipeline.Progress) -> Iterator[Contestant]:
    for done, contestant in enumerate(contestants):
        progress(f"{stage} {contestant.name}"[:40], done, len(contestants))
        yield contestant


def _judged(workspace: Workspace, contestant: Contestant, pairs: Pairs | None, texts: Sequence[str]) -> Contestant:
    """Against the dense model. texts: what bits per byte are measured on, () where nobody asks."""
    _require_same_model(contestant.folder, workspace)
    found = pipeline.measure_quality(workspace, contestant.folder, _opened(contestant.folder, contestant.kv_cache))
    keys = ("cosine",) if workspace.task == ENCODER_TASK else ("kl", "perplexity_ratio", "top1")
    quality = {key: float(found[key]) for key in keys}
    if pairs is not None:
        quality |= _spearman(workspace, contestant, pairs)
    if texts:
        quality["bits_per_byte"] = _bits_per_byte(workspace, contestant, texts)
    return replace(contestant, quality=quality)


def _judged_alone(
    workspace: Workspace, contestant: Contestant, own: Workspace, pairs: Pairs | None, texts: Sequence[str]
) -> Contestant:
    """A smaller model, by what does not need the dense model's vectors or vocabulary."""
    if workspace.pooling is not None:
        missing = "its embeddings live in another space: no cosine to the dense model's"
        quality = {} if pairs is None else _spearman(workspace, contestant, pairs)
    else:
        missing = "its tokens are its own: no KL, perplexity ratio or top-1 agreement with the dense model"
        quality = {"bits_per_byte": _bits_per_byte(own, contestant, texts)}
    return replace(contestant, quality=quality, notes=(*contestant.notes, missing))


def _spearman(workspace: Workspace, contestant: Contestant, pairs: Pairs) -> dict[str, float]:
    measured = _sts_quality(workspace, contestant.folder, pairs)
    return {key: measured[key] for key in ("spearman", "spearman_loss", "spearman_loss_low", "spearman_loss_high")}


def _bits_per_byte(own: Workspace, contestant: Contestant, texts: Sequence[str]) -> float:
    decoder = _opened(contestant.folder, contestant.kv_cache) or verify.decoder_of(contestant.folder)
    return bits_per_byte(decoder.logits, own.tokenizer, texts, min(own.context, DECODER_LENGTH))


def _opened(folder: Path, kv_cache: str) -> Any:
    """What is not opened as usual: another tool's folder, or an artifact with a cache of its user's choice; or None."""
    return open_artifact(folder, RuntimeOptions(kv_cache=kv_cache)) if kv_cache else _opened_peer(folder)


def _opened_peer(folder: Path) -> Any:
    """A folder that another tool runs (torch), loaded by it; None for an artifact."""
    return loader_of(folder).load(folder, RuntimeOptions()) if tool_of(folder) else None


def bench_shape(
    request: ShapeRequest,
    settings: BenchSettings,
    work: Path,
    progress: pipeline.Progress,
    device: Device | None = None,
) -> tuple[list[Measurement], list[ExportCost]]:
    """Speed on a named random-weight shape; see `contestants.of_shape`. device: as in `bench`."""
    contestants, costs = of_shape(request, work, progress)
    rows = run_bench(
        contestants, settings, lambda done, total, text: progress(f"bench {text}"[:40], done, total), device
    )
    return rows, costs
