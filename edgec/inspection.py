"""What a folder is, and whether this installation works: `edgec inspect` and `edgec doctor`."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgec.checkpoint import open_checkpoint, read_json
from edgec.errors import CheckpointError, EdgecError, VerificationError
from edgec.gguf_header import is_gguf, read_header
from edgec.records import MANIFEST_NAME, Choice, Plan


@dataclass(frozen=True)
class Inspection:
    """title and headline to print first, the plan if there is one, lines to end with; summary is the JSON form."""

    title: str
    headline: Mapping[str, Any]
    plan: Plan | None
    lines: tuple[str, ...]
    summary: Mapping[str, Any]


def inspect(path: Path, *, check: bool = False) -> Inspection:
    """Raises CheckpointError for what is not a folder of edgec's or transformers', VerificationError listing every file
    that differs.
    """
    if is_gguf(path):
        return _gguf(path)
    if (path / MANIFEST_NAME).is_file():
        manifest = _manifest(path)
        if manifest.get("kind") == "artifact":
            if check:
                verify_files(path, manifest)
            return _artifact(path, manifest, checked=check)
        from edgec.compress.store import open_compressed

        opened = open_compressed(path)
        headline = {
            "kind": "compressed checkpoint",
            "made from": opened.dense_fingerprint[:23] + "…",
            **_totals(opened.plan),
        }
        return Inspection(str(path), headline, opened.plan, opened.plan.notes, {**headline, "folder": str(path)})
    if (path / "profile.json").is_file():
        from edgec.profile.store import load_profile

        profile = load_profile(path)
        headline = {
            "kind": "profile",
            "made from": profile.fingerprint[:23] + "…",
            "text": f"{profile.tokens} tokens of {profile.calibration}",
            "layers": len(profile.layers),
            "incompressible": sum(layer.incompressible for layer in profile.layers),
        }
        return Inspection(str(path), headline, None, (), headline)
    checkpoint = open_checkpoint(path)
    headline = {
        "kind": "checkpoint",
        "architecture": checkpoint.architecture,
        "parameters": checkpoint.parameters,
        "tensors": len(checkpoint.tensors),
        "fingerprint": checkpoint.fingerprint,
    }
    return Inspection(str(path), headline, None, (), headline)


def _gguf(path: Path) -> Inspection:
    """A file of any types and any architecture: what its header says, checked against its size."""
    header = read_header(path)
    parameters = sum(tensor.elements for tensor in header.tensors.values())
    by_type: dict[str, int] = {}
    for tensor in header.tensors.values():
        by_type[tensor.type_name] = by_type.get(tensor.type_name, 0) + tensor.nbytes
    stored = sum(by_type.values())
    headline = {
        "kind": "GGUF file",
        "architecture": header.text("general.architecture", "unknown"),
        "parameters": parameters,
        "tensors": len(header.tensors),
        "types": ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sorted(by_type.items())),
        "bits per weight": 8 * stored / parameters if parameters else 0.0,
        "metadata keys": len(header.metadata),
    }
    return Inspection(str(path), headline, None, (), headline)


def verify_files(path: Path, manifest: Mapping[str, Any]) -> None:
    """Every file against its hash. Raises VerificationError listing what is missing, added or changed."""
    expected = manifest.get("files")
    if not isinstance(expected, dict):
        raise CheckpointError(f"{path / MANIFEST_NAME}: the manifest is damaged (no files)")
    there = {str(f.relative_to(path)): f.is_file() for f in path.rglob("*") if not f.is_dir() or f.is_symlink()}
    there.pop(MANIFEST_NAME, None)
    present = {name for name, regular in there.items() if regular}
    problems = [f"{name} is missing" for name in sorted(set(expected) - present)]
    problems += [f"{name} was added" for name in sorted(there.keys() - expected.keys())]
    for name in sorted(present & set(expected)):
        with (path / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected[name]:
                problems.append(f"{name} was changed")
    if problems:
        raise VerificationError(f"{path}: {'; '.join(problems)}; export it again")


def plan_of(path: Path) -> Plan:
    """The plan of an artifact, or of what `edgec compress` wrote. Raises CheckpointError."""
    manifest = _manifest(path)
    if manifest.get("kind") == "artifact":
        return _plan(path, manifest)
    from edgec.compress.store import open_compressed

    return open_compressed(path).plan


def healing_curve_of(path: Path) -> tuple[tuple[float, int, float], ...]:
    """(seconds, step, held-out divergence) of the healing in an artifact's manifest; () where there was none. Checks at
    which it was no number are left out: the run went back from there.

    Raises CheckpointError.
    """
    entry = _manifest(path).get("healing") or {}
    try:
        points = entry.get("curve", ())
        return tuple((float(seconds), int(step), float(value)) for seconds, step, value in points if value is not None)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path / MANIFEST_NAME}: the healing is damaged ({error!r})") from error


def manifest_of(artifact: Path) -> dict[str, Any]:
    """What edgec wrote of an artifact; empty for what edgec did not write. Raises CheckpointError for no JSON."""
    found = read_json(artifact / MANIFEST_NAME) if (artifact / MANIFEST_NAME).is_file() else {}
    return found if isinstance(found, dict) else {}


def _manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path / MANIFEST_NAME)
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path / MANIFEST_NAME}: not an edgec manifest")
    return manifest


def _plan(path: Path, manifest: Mapping[str, Any]) -> Plan:
    try:
        entry = manifest["plan"]
        choices = tuple(Choice.from_dict(c) for c in entry["choices"])
        return Plan(
            entry["fingerprint"], entry["target"], entry["budget"], choices, entry["other_bytes"], tuple(entry["notes"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST_NAME}: the plan is damaged ({error!r})") from error


def _artifact(path: Path, manifest: Mapping[str, Any], *, checked: bool) -> Inspection:
    plan = _plan(path, manifest)
    try:
        headline = {
            "kind": f"artifact for {manifest['target']} ({manifest['task']})",
            "made from": str(manifest["fingerprint"])[:23] + "…",
            "by": f"edgec {manifest['edgec']}",
            **_totals(plan),
            "model bytes": manifest["sizes"]["model_bytes"],
            "total bpw": float(manifest["sizes"]["total_bpw"]),
            "parity": float(manifest["parity"]["error"]),
            **{f"quality {k}": v for k, v in manifest["quality"].items()},
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST_NAME}: the manifest is damaged ({error!r})") from error
    lines = (
        *plan.notes,
        "every file matches the manifest" if checked else "files not checked; --check compares their hashes",
    )
    return Inspection(str(path), headline, plan, lines, manifest)


def _totals(plan: Plan) -> dict[str, Any]:
    return {"target": plan.target, "budget": plan.budget, "linear bpw": plan.linear_bpw(), "planned bytes": plan.bytes}


@dataclass(frozen=True)
class Finding:
    """One line of `edgec doctor`. optional: something that is absent and that most people do without; no failure."""

    check: str
    ok: bool
    detail: str
    optional: bool = False


def doctor(progress: Callable[[str, int, int], None]) -> list[Finding]:
    """Versions, memory, disk, devices, and a tiny random encoder exported and run end to end."""
    import psutil

    from edgec.bench.devices import file, kinds, open_device

    findings = [
        Finding("device local", True, ", ".join(f"{k} {v}" for k, v in open_device("local").describe().items()))
    ]
    for kind in kinds():
        if kind != "local":  # another machine is optional: what it lacks is told, and no failure
            missing = file(kind).needs()
            told = "needs " + "; ".join(missing) if missing else f"ready: --device {file(kind).USAGE}"
            findings.append(Finding(f"device {kind}", True, told, optional=bool(missing)))
    for name in ("torch", "transformers", "optimum", "onnx", "onnxruntime", "onnxruntime-genai", "safetensors"):
        try:
            findings.append(Finding(name, True, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, False, f"not installed; pip install {name}"))
    memory = psutil.virtual_memory().available
    findings.append(Finding("memory", memory > 2e9, f"{memory / 1e9:.1f} GB available"))
    free = shutil.disk_usage(tempfile.gettempdir()).free
    findings.append(Finding("disk", free > 2e9, f"{free / 1e9:.1f} GB free for temporary files"))
    findings.append(_end_to_end(progress))
    return findings


def _end_to_end(progress: Callable[[str, int, int], None]) -> Finding:
    """Exports a two-layer random BERT without a tokenizer and verifies it.

    Where that passes, torch's exporter, the lowering and onnxruntime all work.
    """
    import torch
    import transformers

    from edgec import modeling, pipeline

    with tempfile.TemporaryDirectory(prefix="edgec-doctor-") as folder:
        source = Path(folder) / "model"
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
        )
        with modeling.quiet_transformers():
            transformers.BertModel(config, add_pooling_layer=False).save_pretrained(source)
        try:
            done = pipeline.export(
                pipeline.ExportRequest(
                    source, "onnx-x64", Path(folder) / "out", plan="dense:int4-b32", plain=True, quality=False
                ),
                progress,
            )
        except EdgecError as error:
            return Finding("export and run", False, str(error))
        return Finding(
            "export and run",
            True,
            f"a tiny BERT agrees with torch within {json.dumps(done.manifest['parity']['error'])}",
        )
