"""The last stage of an export: what was written is run, and the manifest records what that showed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgec._version import __version__
from edgec.calibration import Batches
from edgec.checkpoint import Checkpoint
from edgec.compress import store
from edgec.evaluate.language import LanguageQuality
from edgec.export import verify
from edgec.export.artifacts import ArtifactKind, Written, kind_of
from edgec.fit import Factors
from edgec.modeling import DECODER_TASK
from edgec.pipeline.stages import Progress
from edgec.records import MANIFEST_VERSION, Plan, Target, as_dict
from edgec.runtime.ort_encoder import OrtEncoder
from edgec.workspace import EncoderQuality, Workspace


@dataclass(frozen=True)
class Product:
    """A plan made real. source: the checkpoint whose biases and norms ship, which healing may have changed."""

    plan: Plan
    factors: Mapping[str, Factors]
    written: Written
    source: Checkpoint
    healing: Mapping[str, Any] = field(default_factory=dict)


def verified_manifest(
    workspace: Workspace,
    product: Product,
    target: Target,
    stage: Path,
    work: Path,
    *,
    quality: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Parity, then quality of the shipped files, then the manifest that records both. Raises VerificationError.

    quality: measure it; off for random weights and where the dense original is not here.
    """
    made, factors, written = product.plan, product.factors, product.written
    kind = kind_of(target)
    progress("verifying", 0, 3)
    batches = workspace.report_batches if quality else workspace.random_batches
    compressed = store.assemble(product.source, factors)
    parity = kind.parity(stage, compressed, workspace.task, batches, work)
    del compressed
    progress("verifying", 1, 3)
    measured = measure_quality(workspace, stage) if quality else {}
    progress("verifying", 2, 3)
    hashes = {str(f.relative_to(stage)): _sha256(f) for f in sorted(stage.rglob("*")) if f.is_file()}
    progress("verifying", 3, 3)
    parameters = workspace.checkpoint.parameters
    chooses_arithmetic = target.artifact == "onnx" and workspace.task != DECODER_TASK
    return {
        "kind": "artifact",
        "version": MANIFEST_VERSION,
        "edgec": __version__,
        "task": workspace.task,
        "target": target.name,
        "fingerprint": made.fingerprint,
        "versions": _versions(kind),
        "plan": as_dict(made),
        "sizes": {
            "model_bytes": written.model_bytes,
            "dense_fp16_bytes": 2 * parameters,
            "parameters": parameters,
            "total_bpw": 8 * written.model_bytes / parameters,
            "linear_bpw": made.linear_bpw(),
            "layers": {name: fitted.stored_bytes for name, fitted in sorted(factors.items())},
            **({"types": dict(written.types)} if written.types else {}),
        },
        "notes": list(written.notes),
        **({"arithmetic": target.encoder_arithmetic} if chooses_arithmetic else {}),
        "healing": dict(product.healing),
        "parity": asdict(parity),
        "quality": measured,
        "files": hashes,
    }


def shipped_loss(workspace: Workspace, artifact: Path) -> float:
    """What `--max-loss` limits, of written files, by their runtime, on the text that plans are compared on."""
    found = _quality_on(workspace.search_batches, workspace, artifact)
    return found.perplexity_ratio - 1.0 if isinstance(found, LanguageQuality) else 1.0 - found.cosine


def measure_quality(workspace: Workspace, artifact: Path, opened: Any = None) -> dict[str, Any]:
    """Quality of an exported folder against the dense model on held-out text, by the runtime that will execute it.

    opened: the folder as something else has loaded it, with the methods that are asked here.
    """
    batches = workspace.report_batches
    found = _quality_on(batches, workspace, artifact, opened)
    ratio = {"perplexity_ratio": found.perplexity_ratio} if isinstance(found, LanguageQuality) else {}
    return {**asdict(found), **ratio, "text": batches.origin}


def _quality_on(
    batches: Batches, workspace: Workspace, artifact: Path, opened: Any = None
) -> LanguageQuality | EncoderQuality:
    if workspace.task == DECODER_TASK:
        decoder = opened or verify.decoder_of(artifact)
        return workspace.language_quality(lambda ids: verify.stacked_logits(decoder, ids), batches)
    vectors = verify.stacked_embeddings(opened or OrtEncoder(artifact), batches)
    return workspace.encoder_quality(vectors, batches)


def _versions(kind: ArtifactKind) -> dict[str, str]:
    names = ("torch", "transformers", *kind.PACKAGES, "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
