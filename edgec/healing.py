"""One healing of one compressed model: what it learns from, who judges it, and whether it was worth it.

The rooms below train; here the pieces of a workspace are put together, and the last word is a comparison in full
precision: a healed model ships only if it is closer to the dense one than it was, on text that it did not learn from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from edgec import modeling
from edgec._version import __version__
from edgec.calibration import Batches
from edgec.errors import EdgecError, RuntimeUnavailableError
from edgec.fit import Factors, stored_arrays
from edgec.heal.cores import Student
from edgec.heal.settings import HealSettings
from edgec.heal.trainer import Curve, HealRun
from edgec.workspace import Workspace

logger = logging.getLogger(__name__)

LORA_RANK = 16
NOTHING_TO_HEAL = 0.01
"""`auto` leaves a model alone that diverges by less: 1 − cosine, or nats per token."""
_TOO_SLOW = 60
"""`auto` does not begin a run that would have fewer steps than this."""
_BYTES_PER_PARAMETER = 32
"""Memory of a run: teacher, student, gradient, two moments of Adam, the best state and the values of quantised cores,
float32.
"""

Progress = Callable[[int, int], None]


Vectors = Mapping[str, NDArray[np.float32]]
"""Biases and norms by the model's own names."""


@dataclass(frozen=True)
class Start:
    """What healing begins from. vectors: those that an earlier healing changed."""

    factors: Mapping[str, Factors]
    vectors: Vectors = field(default_factory=dict)


@dataclass(frozen=True)
class Healed:
    """factors and vectors as they ship; both as they were where healing did not help.

    before, after: divergence from the dense model on held-out text, in float32: 1 − mean cosine, or nats per token.
    curve: what the run saw; None where there was none. note: a sentence for the plan.
    """

    factors: Mapping[str, Factors]
    vectors: Vectors
    before: float
    after: float
    note: str
    settings: HealSettings
    curve: Curve | None = None

    def record(self) -> dict[str, Any]:
        """For the manifest: what was done, how to repeat it, what it gave."""
        if self.curve is None:
            return {"note": self.note}
        return {
            "note": self.note,
            "method": self.settings.method,
            "device": self.settings.device,
            "seed": self.settings.seed,
            "divergence_before": _told(self.before),
            "divergence_after": _told(self.after),
            "kept": self.after < self.before,
            "curve": [[s, step, _told(value)] for s, step, value in self.curve.points],
        }


def _told(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def reason_to_skip(workspace: Workspace, settings: HealSettings, factors: Mapping[str, Factors]) -> str:
    """Why `auto` would leave healing out, before anything is trained; "" where it would not."""
    return _reason_to_skip(workspace, settings, _divergence(workspace, Start(factors)))


def heal(
    workspace: Workspace,
    start: Start,
    settings: HealSettings,
    *,
    state_file: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Healed:
    """Distil the dense model into `start`. Raises RuntimeUnavailableError when the device is not there, EdgecError when
    memory cannot hold the run.
    """
    device = _device(settings.device)
    before = _divergence(workspace, start)

    def unchanged(note: str, curve: Curve | None = None) -> Healed:
        return Healed(start.factors, start.vectors, before, before, note, settings, curve)

    if reason := _reason_to_skip(workspace, settings, before):
        return unchanged(f"healing: {reason}")
    _require_memory(workspace)
    student = Student(
        modeling.load_dense(workspace.checkpoint),
        start.factors,
        start.vectors,
        lora_rank=LORA_RANK if settings.method == "lora" else 0,
    )
    student.model.to(device)  # type: ignore[arg-type]
    run = HealRun(
        student,
        workspace.model.to(device),  # type: ignore[arg-type]
        workspace.healing_batches.items,
        lambda model: workspace.divergence(model, workspace.judging_batches),
        settings,
        workspace.pooling,
        state_file,
        _key(workspace, start, settings) if state_file else "",
        progress,
    )
    try:
        if settings.mode == "auto" and (reason := _too_slow(run, settings)):
            return unchanged(f"healing: {reason}")
        curve = run.run()
    finally:
        workspace.model.to("cpu")  # type: ignore[arg-type]
    student.model.to("cpu")  # type: ignore[arg-type]
    healed = Start(student.factors(), student.vectors())
    after = _divergence(workspace, healed)
    told = f"{settings}, best of {curve.points[-1][1]} steps, divergence {before:.3g} → {after:.3g}"
    notes = "".join(f"; {note}" for note in curve.notes)
    if not after < before:
        return unchanged(f"healing did not help and is discarded ({told}{notes})", curve)
    return Healed(healed.factors, healed.vectors, before, after, f"healed: {told}{notes}", settings, curve)


def _divergence(workspace: Workspace, start: Start) -> float:
    """Of the numbers as they ship, in float32, on the text that plans are compared on."""
    return workspace.loss_with(start.factors, workspace.divergence_on_search, start.vectors)


def _reason_to_skip(workspace: Workspace, settings: HealSettings, before: float) -> str:
    if settings.mode != "auto":
        return ""
    if before < NOTHING_TO_HEAL:
        return f"auto leaves it out: the plan diverges by {before:.2g} only"
    need, have = _memory(workspace)
    if need > 0.8 * have:
        return f"auto leaves it out: needs about {need / 1e9:.1f} GB of memory, {have / 1e9:.1f} GB are free"
    return ""


def _too_slow(run: HealRun, settings: HealSettings) -> str:
    started = time.monotonic()
    run.rehearse()
    step = time.monotonic() - started
    possible = settings.amount / step
    if possible < _TOO_SLOW:
        return f"auto leaves it out: {settings.amount:.0f} s would be {possible:.0f} steps of {step:.1f} s"
    return ""


def _memory(workspace: Workspace) -> tuple[float, float]:
    return float(_BYTES_PER_PARAMETER * workspace.checkpoint.parameters), float(psutil.virtual_memory().available)


def _require_memory(workspace: Workspace) -> None:
    need, have = _memory(workspace)
    if need > have:
        raise EdgecError(
            f"healing needs about {need / 1e9:.1f} GB of memory and {have / 1e9:.1f} GB are free; use --heal off, or a "
            "machine with more"
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise RuntimeUnavailableError(
            f"--device {name}: this torch cannot use it ({str(error).splitlines()[0][:120]}); use --device cpu"
        ) from error
    return device


def _key(workspace: Workspace, start: Start, settings: HealSettings) -> str:
    """What a resumed run must have in common with the one that was interrupted: all but where it runs and how long. The
    numbers that it starts from too, because some of them (scales, say) are trained as differences from those.
    """
    told: list[object] = [
        __version__,
        workspace.checkpoint.fingerprint,
        {name: str(fitted.contraction) for name, fitted in sorted(start.factors.items())},
        _numbers_hash(start),
        workspace.healing_batches.origin,
        _tokens_hash(workspace.healing_batches),
        settings.method,
        settings.seed,
        settings.mode == "steps",
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _numbers_hash(start: Start) -> str:
    digest = hashlib.sha256()
    for name, fitted in sorted(start.factors.items()):
        for core, stored in sorted(fitted.cores.items()):
            digest.update(f"{name}/{core}".encode())
            for array in stored_arrays(stored):
                digest.update(np.ascontiguousarray(array).tobytes())
    for name, vector in sorted(start.vectors.items()):
        digest.update(name.encode() + np.ascontiguousarray(vector).tobytes())
    return digest.hexdigest()


def _tokens_hash(batches: Batches) -> str:
    digest = hashlib.sha256()
    for batch in batches.items:
        digest.update(batch["input_ids"].numpy().tobytes())
    return digest.hexdigest()
