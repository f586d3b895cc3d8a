"""Runs ONNX models in the aarch64 onnxruntime of a built root, and brings outputs and peak memory back."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgec.bench.devices._arm64_root import CORTEX_A76, CPUS, python_command, python_environment
from runtime_tests.arm64 import worker

DEFAULT_CPU = CORTEX_A76
"""The CPU model that a case runs on unless it says otherwise; onnxruntime picks other kernels on the newest one."""


class Arm64Error(Exception):
    """The run on arm64 failed; the message names the model and what the worker said."""


class UnsupportedOnArm64Error(Arm64Error):
    """onnxruntime's aarch64 wheel has no kernel for an operator (or its bits, or its types) in the model."""


__all__ = ["CPUS", "DEFAULT_CPU", "Arm64Error", "Arm64Root", "Arm64Run", "Case", "UnsupportedOnArm64Error"]


@dataclass(frozen=True)
class Case:
    """One model run. `fetch` None means every output; `optimization` is a name from `worker.LEVELS`.

    config: session configuration entries. Graphs whose scales are fp16 behind a Cast need at least "basic": with
    "disable", onnxruntime 1.31 packs unfolded scales as zeros or garbage, on either machine, and says nothing.
    """

    model: Path
    inputs: Mapping[str, np.ndarray]
    fetch: tuple[str, ...] | None = None
    optimization: str = "all"
    config: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm64Run:
    """What one case gave.

    outputs: by name. peak_rss_bytes: peak resident memory of the emulated process up to the end of this case.
    session_rss_bytes: that minus the peak before the first session, which holds interpreter, numpy, onnxruntime
    and emulator: the figure to compare between artifacts. version: onnxruntime's. machine: as the guest sees it.
    """

    outputs: dict[str, np.ndarray]
    peak_rss_bytes: int
    session_rss_bytes: int
    version: str
    machine: str


@dataclass(frozen=True)
class Arm64Root:
    """A built root folder (`build.ensure_root`)."""

    path: Path

    def run_onnx(
        self,
        model: Path,
        inputs: Mapping[str, np.ndarray],
        *,
        fetch: tuple[str, ...] | None = None,
        optimization: str = "all",
        config: Mapping[str, str] | None = None,
        cpu: str = DEFAULT_CPU,
        timeout_s: float = 120.0,
    ) -> Arm64Run:
        """Run one model (external data beside it is found as usual) on one thread."""
        result = self.run_many([Case(model, inputs, fetch, optimization, config or {})], cpu=cpu, timeout_s=timeout_s)[
            0
        ]
        if isinstance(result, Arm64Error):
            raise result
        return result

    def run_many(
        self, cases: Sequence[Case], *, cpu: str = DEFAULT_CPU, timeout_s: float = 120.0
    ) -> list[Arm64Run | Arm64Error]:
        """Run cases one after the other in one emulated process; a case that onnxruntime refuses gives its error.

        Raises `Arm64Error` when the process itself crashes, hangs or does not run on aarch64.
        """
        with tempfile.TemporaryDirectory(prefix="edgec-arm64-") as folder:
            job, outputs = _write_job(Path(folder), cases)
            report = self._run_worker(job, cases, cpu, timeout_s)
            if report["machine"] != "aarch64":
                raise Arm64Error(f"the worker ran on {report['machine']!r}, expected 'aarch64'")
            return [
                _result(case, entry, path, report)
                for case, entry, path in zip(cases, report["cases"], outputs, strict=True)
            ]

    def _run_worker(self, job: Path, cases: Sequence[Case], cpu: str, timeout_s: float) -> dict[str, Any]:
        """Start the worker under the emulator and read its report."""
        command = [*python_command(self.path, cpu), "-B", str(worker.__file__), str(job)]
        report_path = job.with_name("report.json")
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
                env=python_environment(self.path),
            )
        except subprocess.TimeoutExpired as error:
            raise Arm64Error(f"{_current(report_path, cases)}: no result on arm64 after {timeout_s:.0f} s") from error
        if done.returncode != 0:
            said = " | ".join(done.stderr.strip().splitlines()[-3:]) or "nothing on stderr"
            raise Arm64Error(f"{_current(report_path, cases)}: the arm64 worker ended with {done.returncode}: {said}")
        report: dict[str, Any] = json.loads(report_path.read_text(encoding="utf-8"))
        return report


def _write_job(folder: Path, cases: Sequence[Case]) -> tuple[Path, list[Path]]:
    """Write the inputs and the job file; returns its path and where each case's outputs will be."""
    entries, outputs = [], []
    for index, case in enumerate(cases):
        inputs = folder / f"{index}-inputs.npz"
        np.savez(inputs, **dict(case.inputs))  # type: ignore[arg-type]  # numpy's stub takes the names for options
        outputs.append(folder / f"{index}-outputs.npz")
        entries.append(
            {
                "model": str(case.model.resolve(strict=True)),
                "inputs": str(inputs),
                "outputs": str(outputs[-1]),
                "fetch": None if case.fetch is None else list(case.fetch),
                "optimization": case.optimization,
                "config": dict(case.config),
            }
        )
    job = folder / "job.json"
    job.write_text(json.dumps({"report": str(folder / "report.json"), "cases": entries}), encoding="utf-8")
    return job, outputs


def _result(case: Case, entry: dict[str, Any], outputs: Path, report: dict[str, Any]) -> Arm64Run | Arm64Error:
    """One entry of the report as a run or as the error to raise."""
    if entry["error"] is not None:
        kind = UnsupportedOnArm64Error if entry["unsupported"] else Arm64Error
        return kind(f"{case.model.name} on arm64 (onnxruntime {report['onnxruntime']}): {entry['error']}")
    with np.load(outputs, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    peak = int(entry["peak_rss_bytes"])
    session = peak - int(report["rss_before_bytes"])
    return Arm64Run(arrays, peak, session, str(report["onnxruntime"]), str(report["machine"]))


def _current(report_path: Path, cases: Sequence[Case]) -> str:
    """Name of the model that the worker was on when it ended."""
    if not report_path.exists():
        return "start of the arm64 worker"
    finished = len(json.loads(report_path.read_text(encoding="utf-8"))["cases"])
    return cases[finished].model.name if finished < len(cases) else "end of the arm64 worker"
