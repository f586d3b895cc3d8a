"""The only place that orders the stages: checkpoint → profile → plan → compress → export → verify.

Each function is one verb of the command line; `export` runs them all. Stages hand records to one another, and where one
needs a judgement from further on (a plan wants its end-to-end loss) it gets a callback from here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgec import modeling, outputs
from edgec._version import __version__
from edgec.compress import store
from edgec.compress.apply import apply_factors, fit_choices
from edgec.errors import BudgetError, EdgecError, UsageError
from edgec.export import verify
from edgec.export.onnx import exporter
from edgec.export.targets import all_targets, get_target
from edgec.fit import Factors
from edgec.modeling import DECODER_TASK, Layer
from edgec.plan import files as plan_files
from edgec.plan.budget import Budget, parse_budget
from edgec.plan.candidates import candidates
from edgec.plan.planner import Sizes, check_plan, constrained_plan, plan_to_budget
from edgec.profile.activations import collect
from edgec.profile.profiler import build_profile
from edgec.profile.store import Profile, load_profile, save_profile
from edgec.quantize.formats import LayerFormat
from edgec.records import MANIFEST_NAME, MANIFEST_VERSION, Choice, Plan, Target, as_dict
from edgec.runtime.ort_decoder import OrtDecoder
from edgec.runtime.ort_encoder import OrtEncoder
from edgec.workspace import CALIBRATION_TOKENS, Workspace, require_text

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""(stage, done, total): the command line draws bars from it."""

_REPLANS = 4
"""How often a plan is made again with a better estimate of what ships beside it."""


def _silent(stage: str, done: int, total: int) -> None:
    """No progress wanted."""


@dataclass(frozen=True)
class ExportRequest:
    """What `edgec export` was asked for. plan: a YAML file or a constraint; profile: a folder made by `edgec profile`;
    plain: fit a given plan without activations (no calibration run; for speed tests). quality: measure the result
    on held-out text; off only for random weights, whose quality means nothing."""

    model: Path
    target: str
    out: Path
    budget: str | None = None
    plan: str | None = None
    calibration: Path | None = None
    profile: Path | None = None
    plain: bool = False
    quality: bool = True
    force: bool = False


@dataclass(frozen=True)
class Exported:
    """What came out: the folder, its plan, its manifest."""

    out: Path
    plan: Plan
    manifest: Mapping[str, Any]


def profile(
    model: Path, out: Path | None, *, calibration: Path | None = None, force: bool = False, progress: Progress = _silent
) -> Profile:
    """Measure every layer and score every candidate of every target; with `out`, save the folder."""
    if out is not None:
        outputs.check_free(out, force=force)
    workspace = Workspace(model, calibration)
    made = make_profile(workspace, list(all_targets().values()), progress)
    if out is not None:
        save_profile(made, out, force=force)
    return made


def make_profile(workspace: Workspace, targets: list[Target], progress: Progress = _silent) -> Profile:
    require_text(workspace)

    def offered(layer: Layer, incompressible: bool) -> list[tuple[Any, Any]]:
        tied = layer.tied_to is not None
        return candidates(targets, layer.role, layer.shape, incompressible=incompressible, tied=tied)

    return build_profile(
        workspace.model,
        workspace.checkpoint,
        workspace.layers,
        workspace.batches("calibrate", CALIBRATION_TOKENS),
        pooling=workspace.pooling,
        candidates=offered,
        cache=workspace.cache,
        progress=progress,
    )


def plan(
    model: Path,
    target: str,
    budget: str,
    *,
    profile_folder: Path | None = None,
    calibration: Path | None = None,
    progress: Progress = _silent,
) -> Plan:
    """The plan that `export` would make, without exporting.

    Budgets on the whole file use an estimate of what else ships.
    """
    workspace = Workspace(model, calibration)
    chosen = get_target(target)
    exporter.refuse_unsupported(workspace.checkpoint, workspace.task)
    with tempfile.TemporaryDirectory(prefix="edgec-plan-") as folder:
        work = Path(folder)
        graph = exporter.dense_graph(workspace.checkpoint, workspace.task, work)
        sizes = _sizes(workspace, graph, work)
    found = _profile_of(workspace, chosen, profile_folder, progress)
    return plan_to_budget(found, chosen, parse_budget(budget), sizes, _evaluator(workspace, found, progress))


def compress(
    model: Path,
    out: Path,
    plan_text: str,
    *,
    target: str = "onnx-x64",
    profile_folder: Path | None = None,
    calibration: Path | None = None,
    plain: bool = False,
    force: bool = False,
    progress: Progress = _silent,
) -> Plan:
    """Fit a plan (a YAML file or a constraint) and write the Compressed folder."""
    outputs.check_free(out, force=force)
    workspace = Workspace(model, calibration)
    workspace.require_finite()
    made = _explicit_plan(workspace, plan_text, target)
    found = _statistics_for(workspace, made, profile_folder, plain, progress)
    factors = _fit(workspace, made.choices, found, progress)
    store.save_compressed(workspace.checkpoint, made, factors, plan_files.write_plan(made), out, force=force)
    return made


def _statistics_for(
    workspace: Workspace, made: Plan, folder: Path | None, plain: bool, progress: Progress
) -> Profile | None:
    """What fitting a given plan needs of the activations: from a profile folder, measured now, or nothing at all."""
    if folder is not None:
        return load_profile(folder, workspace.checkpoint)
    lossless = all(c.spec.kind == "dense" and not LayerFormat.parse(c.format).quantised for c in made.choices)
    if plain or lossless:
        return None
    require_text(workspace)
    statistics = collect(
        workspace.model,
        workspace.layers,
        workspace.batches("calibrate", CALIBRATION_TOKENS),
        pooling=workspace.pooling,
        curvature=False,
        progress=lambda done, total: progress("calibrating", done, total),
    )
    return Profile(workspace.checkpoint.fingerprint, workspace.text.origin, statistics.tokens, (), statistics)


def export(request: ExportRequest, progress: Progress = _silent) -> Exported:
    """Everything: the folder that a runtime loads, verified, with its manifest; whole or not at all."""
    target = get_target(request.target)
    budget = parse_budget(request.budget or target.default_budget)
    outputs.check_free(request.out, force=request.force)
    compressed = store.is_compressed(request.model)
    if compressed and (request.plan or request.budget or request.profile):
        raise UsageError(
            f"{request.model} is already compressed; --plan, --budget and --profile belong to the dense model"
        )
    if request.plan and request.budget:
        raise UsageError(
            "--plan already decides every layer; leave --budget out, or make a plan that fits with "
            "`edgec plan --budget`"
        )
    out = request.out
    with outputs.staged_folder(out, force=request.force) as stage, outputs.work_folder(out) as work:
        if compressed:
            request = replace(request, quality=False)  # its dense original is not here to compare with
            workspace, made, factors = _from_compressed(request, target, work)
            graph = exporter.dense_graph(workspace.checkpoint, workspace.task, work)
            written = _write(workspace, graph, factors, target, stage, progress)
        else:
            workspace = Workspace(request.model, request.calibration)
            exporter.refuse_unsupported(workspace.checkpoint, workspace.task)
            workspace.require_finite()
            made, factors, written = _plan_and_write(workspace, request, target, budget, stage, work, progress)
        manifest = _verified_manifest(workspace, made, factors, written, target, stage, request, progress)
        (stage / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        if made.budget == str(budget):
            _require_within(budget, stage, written)
    return Exported(request.out, made, manifest)


def _require_within(budget: Budget, stage: Path, written: exporter.Written) -> None:
    """The last look, at the finished folder itself. Raises BudgetError."""
    whole = sum(f.stat().st_size for f in stage.rglob("*") if f.is_file())
    if budget.kind == "size" and not whole <= budget.value:
        raise BudgetError(
            f"budget {budget}: the finished folder has {whole} bytes, {whole - written.model_bytes} of them beside the "
            "model; raise --budget a little"
        )


def _plan_and_write(
    workspace: Workspace,
    request: ExportRequest,
    target: Target,
    budget: Budget,
    stage: Path,
    work: Path,
    progress: Progress,
) -> tuple[Plan, dict[str, Factors], exporter.Written]:
    """Plan, fit and write until the files that were really written are within the budget."""
    if request.plan is not None:
        made = _explicit_plan(workspace, request.plan, request.target)
        found = _statistics_for(workspace, made, request.profile, request.plain, progress)
        factors = _fit(workspace, made.choices, found, progress)
        graph = exporter.dense_graph(workspace.checkpoint, workspace.task, work)
        return made, factors, _write(workspace, graph, factors, target, stage, progress)
    progress("building the graph", 0, 1)
    graph = exporter.dense_graph(workspace.checkpoint, workspace.task, work)
    progress("building the graph", 1, 1)
    sizes = _sizes(workspace, graph, work)
    found = _profile_of(workspace, target, request.profile, progress)
    evaluate = _evaluator(workspace, found, progress)
    for attempt in range(_REPLANS):
        made = plan_to_budget(found, target, budget, sizes, evaluate)
        factors = _fit(workspace, made.choices, found, progress)
        if attempt:
            graph = exporter.dense_graph(workspace.checkpoint, workspace.task, work)
        written = _write(workspace, graph, factors, target, stage, progress)
        over = _overrun(budget, workspace, stage, written)
        if over <= 0:
            return made, factors, written
        logger.info("the written model is %d bytes over the budget; planning again", over)
        sizes = replace(sizes, other_bytes=sizes.other_bytes + int(over) + 64)
    raise BudgetError(
        f"budget {budget}: no plan fits after {_REPLANS} tries; the last was {over} bytes over. Raise --budget"
    )


def _overrun(budget: Budget, workspace: Workspace, stage: Path, written: exporter.Written) -> float:
    companions = sum(f.stat().st_size for f in stage.rglob("*") if f.is_file()) - written.model_bytes
    files = companions + _manifest_bytes(workspace)
    return written.model_bytes - budget.model_bytes(workspace.checkpoint.parameters, files)


def _manifest_bytes(workspace: Workspace) -> int:
    """Room for edgec.json in a budget on the whole folder [bytes]; a layer's choice and hashes take about 600."""
    return 4096 + 1024 * len(workspace.layers)


def _write(
    workspace: Workspace, graph: Any, factors: Mapping[str, Factors], target: Target, stage: Path, progress: Progress
) -> exporter.Written:
    written = exporter.write_model(graph, factors, target, stage, lambda d, t: progress("writing", d, t))
    exporter.write_companions(workspace.checkpoint, graph, stage)
    return written


def _from_compressed(request: ExportRequest, target: Target, work: Path) -> tuple[Workspace, Plan, dict[str, Factors]]:
    """A compressed folder as a workspace over its densified weights, its plan, its factors as they were stored."""
    opened = store.open_compressed(request.model)
    exporter.refuse_unsupported(opened.checkpoint, modeling.task_of(opened.checkpoint))
    opened.checkpoint.check_finite()
    checkpoint = store.densify(opened, work / "dense")
    workspace = Workspace(checkpoint.folder, request.calibration)
    check_plan(replace(opened.plan, fingerprint=""), workspace.layers, target, "")
    note = f"exported from a compressed folder: `edgec eval {request.out.name} --model DENSE` measures its quality"
    return workspace, replace(opened.plan, notes=(*opened.plan.notes, note)), store.read_factors(opened)


def _explicit_plan(workspace: Workspace, text: str, target: str) -> Plan:
    """--plan: a YAML file, or a constraint such as uniform:0.5."""
    fingerprint, chosen = workspace.checkpoint.fingerprint, get_target(target)
    if Path(text).is_file():
        made = plan_files.read_plan(Path(text), workspace.layers)
        check_plan(made, workspace.layers, chosen, fingerprint)
        return made
    if ":" not in text:
        raise UsageError(f"--plan {text}: no such file, and not a constraint such as uniform:0.5 or dense:fp32")
    return constrained_plan(text, workspace.layers, chosen, fingerprint)


def _profile_of(workspace: Workspace, target: Target, folder: Path | None, progress: Progress) -> Profile:
    return load_profile(folder, workspace.checkpoint) if folder else make_profile(workspace, [target], progress)


def _sizes(workspace: Workspace, graph: Any, work: Path) -> Sizes:
    planned = {layer.name for layer in workspace.layers}
    trial = work / "companions"
    trial.mkdir(exist_ok=True)
    companions = exporter.write_companions(workspace.checkpoint, graph, trial) + _manifest_bytes(workspace)
    return Sizes(workspace.checkpoint.parameters, exporter.other_bytes(graph, planned), companions)


def _fit(workspace: Workspace, choices: Any, found: Profile | None, progress: Progress) -> dict[str, Factors]:
    return fit_choices(
        choices,
        workspace.weight,
        workspace.layers,
        found.statistics.moment if found else lambda name: None,
        workspace.cache,
        lambda done, total: progress("fitting", done, total),
    )


def _evaluator(workspace: Workspace, found: Profile, progress: Progress) -> Callable[[list[Choice]], float]:
    """Measured loss of whole plans, for the planner's last decision."""
    tried = 0

    def evaluate(choices: list[Choice]) -> float:
        nonlocal tried
        tried += 1
        progress("trying plans", tried - 1, tried)
        factors = _fit(workspace, choices, found, _silent)
        with workspace.substituted(factors) as model:
            return workspace.divergence(model, workspace.search_batches)

    return evaluate


def _verified_manifest(
    workspace: Workspace,
    made: Plan,
    factors: Mapping[str, Factors],
    written: exporter.Written,
    target: Target,
    stage: Path,
    request: ExportRequest,
    progress: Progress,
) -> dict[str, Any]:
    """Parity, then quality of the shipped files, then the manifest that records both. Raises VerificationError."""
    progress("verifying", 0, 3)
    batches = workspace.report_batches if request.quality else workspace.random_batches
    compressed = store.assemble(workspace.checkpoint, factors)
    parity = verify.verify_parity(stage, compressed, workspace.task, batches)
    del compressed
    progress("verifying", 1, 3)
    quality = measure_quality(workspace, stage) if request.quality else {}
    progress("verifying", 2, 3)
    hashes = {str(f.relative_to(stage)): _sha256(f) for f in sorted(stage.rglob("*")) if f.is_file()}
    progress("verifying", 3, 3)
    parameters = workspace.checkpoint.parameters
    return {
        "kind": "artifact",
        "version": MANIFEST_VERSION,
        "edgec": __version__,
        "task": workspace.task,
        "target": target.name,
        "fingerprint": made.fingerprint,
        "versions": _versions(),
        "plan": as_dict(made),
        "sizes": {
            "model_bytes": written.model_bytes,
            "dense_fp16_bytes": 2 * parameters,
            "parameters": parameters,
            "total_bpw": 8 * written.model_bytes / parameters,
            "linear_bpw": made.linear_bpw(),
            "layers": {name: fitted.stored_bytes for name, fitted in sorted(factors.items())},
        },
        "parity": asdict(parity),
        "quality": quality,
        "files": hashes,
    }


def measure_quality(workspace: Workspace, artifact: Path) -> dict[str, Any]:
    """Quality of an exported folder against the dense model on held-out text, by the runtime that will execute it."""
    batches = workspace.report_batches
    if workspace.task == DECODER_TASK:
        decoder = OrtDecoder(artifact)
        found = workspace.language_quality(lambda ids: verify.stacked_logits(decoder, ids), batches)
        return {**asdict(found), "perplexity_ratio": found.perplexity / found.dense_perplexity, "text": batches.origin}
    encoder = OrtEncoder(artifact)
    vectors = verify.stacked_embeddings(encoder, batches)
    return {**asdict(workspace.encoder_quality(vectors, batches)), "text": batches.origin}


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


__all__ = [
    "EdgecError",
    "ExportRequest",
    "Exported",
    "apply_factors",
    "compress",
    "export",
    "modeling",
    "plan",
    "profile",
]
