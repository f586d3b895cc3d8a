"""Runs ONNX models and says what came out. Inside the arm64 root it is the whole program; numpy and onnxruntime only.

One process runs many cases, because starting python and importing onnxruntime costs seconds under emulation. The
report is rewritten after every case: when a kernel crashes the process, the caller still knows which case it was.
`run_case` is also called on the x86-64 side, so that both sides run the model with the same session options.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

LEVELS = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
"""Names of the graph optimisation levels that a case may ask for."""

_FATAL = 4
"""onnxruntime's logging severity "fatal" [level]: warnings about the emulated machine would hide real errors."""


def run_case(
    model: str,
    inputs: dict[str, np.ndarray],
    fetch: list[str] | None = None,
    optimization: str = "all",
    config: dict[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """Outputs by name of one run on one thread; `fetch` None means every output, `config` is session entries."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.graph_optimization_level = LEVELS[optimization]
    options.log_severity_level = _FATAL
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()] if fetch is None else fetch
    return dict(zip(names, session.run(names, inputs), strict=True))


def is_unsupported(error: Exception) -> bool:
    """Whether onnxruntime refused the graph because it has no kernel for an operator, its types or its attributes."""
    text = str(error)
    return (
        type(error).__name__ in {"NotImplemented", "InvalidGraph"}
        or "Could not find an implementation" in text
        or "is not a registered function/op" in text
        or ("Exception during initialization" in text and "supported" in text)
    )


def peak_rss_bytes() -> int:
    """Peak resident memory of this process [bytes]; under qemu-user the emulator's own memory is in it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main(job_path: str) -> None:
    """Run every case of a job file: {"report", "cases": [{"model", "inputs", "outputs", ...}]}; see `root.Case`."""
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    finished: list[dict[str, Any]] = []
    report: dict[str, Any] = {
        "machine": platform.machine(),
        "onnxruntime": ort.__version__,
        "numpy": np.__version__,
        "rss_before_bytes": peak_rss_bytes(),
        "cases": finished,
    }
    Path(job["report"]).write_text(json.dumps(report), encoding="utf-8")
    for case in job["cases"]:
        result: dict[str, Any] = {"error": None, "unsupported": False}
        try:
            with np.load(case["inputs"], allow_pickle=False) as archive:
                inputs = {name: archive[name] for name in archive.files}
            outputs = run_case(case["model"], inputs, case["fetch"], case["optimization"], case["config"])
            np.savez(case["outputs"], **outputs)  # type: ignore[arg-type]  # the stub takes names for options
        except Exception as error:  # noqa: BLE001  # reported, and raised by the caller with the model's name
            result["error"] = f"{type(error).__name__}: {error}"
            result["unsupported"] = is_unsupported(error)
        result["peak_rss_bytes"] = peak_rss_bytes()
        finished.append(result)
        Path(job["report"]).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
