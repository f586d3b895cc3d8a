"""What one weight of each number format costs the runtime on this machine, in time and in memory: a measured rate that
estimates are made from before an artifact exists.

One graph per format holds a stack of equal matrix products with random weights, together as large as the model's own
(so that caches help as much as they will), and runs in a fresh process (`edgec.bench.probe`). Who asks brings the
writer of the graph (`edgec.export.onnx.stack`), so that what is measured is what an export writes. A plain copy
benchmark of memory bandwidth was turned down as the only measure: 2-, 4- and 8-bit kernels are not equally near to it,
and at the rows of a sentence none of them is bound by memory.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgec.bench.devices.local import worker_environment
from edgec.errors import BenchError
from edgec.quantize.formats import CoreFormat
from edgec.runtime.interfaces import CAUSAL_LM
from edgec.runtime.options import physical_cores
from edgec.subprocesses import run

MAX_WEIGHTS = 1 << 24
"""Most weights in one probe [count]: beyond any CPU cache in every format but 2 bits, and quick to write."""

MIN_WEIGHTS = 1 << 21
"""Fewest weights in one probe [count]: enough that its memory stands out from the process's."""

_SECONDS = 0.4
_TIMEOUT_S = 120.0


Write = Callable[[Path, CoreFormat, tuple[int, int], int], int]
"""(folder, format, (out, in), copies) → writes model.onnx, a stack of so many products, into the existing folder; the
stored bytes of their weights. Its inputs are all x [rows, in]."""


@dataclass(frozen=True)
class KernelRate:
    """Of one format. ns_per_weight: time of one multiplied weight at `rows` rows of x [ns], all rows together.
    overhead: resident bytes that a stored byte becomes, at the peak of session creation. gb_s: stored bytes per second.
    """

    format: str
    rows: int
    threads: int
    ns_per_weight: float
    overhead: float
    gb_s: float


@dataclass(frozen=True)
class RuntimeRates:
    """empty_rss_bytes: of a process that has imported the task's runtime and loaded nothing. session_bytes: what a
    session with next to no weights adds to that. rates: by format. load: runnable processes per core just before.
    """

    empty_rss_bytes: int
    session_bytes: int
    load: float
    rates: dict[str, KernelRate]


def measure(
    task: str,
    formats: Sequence[str],
    shape: tuple[int, int],
    weights: int,
    rows: int,
    write: Write,
    threads: int = 0,
) -> RuntimeRates:
    """Measure the runtime that executes `task`, and one probe per format, a fresh process each (about a second).

    shape: (out, in) of the typical matrix. weights: of all of the model's matrices together. Raises BenchError.
    """
    threads = threads or physical_cores()
    load = os.getloadavg()[0] / physical_cores()
    loader = "genai" if task == CAUSAL_LM else "ort_encoder"
    empty = probe("", loader, rows, threads)["runtime_rss_bytes"]
    rates = {}
    with tempfile.TemporaryDirectory(prefix="edgec-probe-") as work:
        least = _written(Path(work) / "least", write, CoreFormat(32), (32, 32), 1)[0]
        told = probe(least, "ort_encoder", rows, threads)
        session = max(0.0, told["peak_rss_bytes"] - told["runtime_rss_bytes"])
        for name in dict.fromkeys(formats):
            n, k = shape
            copies = max(1, round(min(max(weights, MIN_WEIGHTS), MAX_WEIGHTS) / (n * k)))
            model, stored = _written(Path(work) / name, write, CoreFormat.parse(name), shape, copies)
            told = probe(model, "ort_encoder", rows, threads)
            shutil.rmtree(Path(work) / name)
            seconds = told["run_ms"] / 1e3
            rates[name] = KernelRate(
                name,
                rows,
                threads,
                1e9 * seconds / (n * k * copies),
                # A mapped page that was never touched is not resident, so less than 1 is possible, less than 0 is not.
                max(0.0, told["peak_rss_bytes"] - told["runtime_rss_bytes"] - session) / stored,
                stored / seconds / 1e9,
            )
    return RuntimeRates(int(empty), int(session), load, rates)


def _written(folder: Path, write: Write, fmt: CoreFormat, shape: tuple[int, int], copies: int) -> tuple[str, int]:
    folder.mkdir()
    stored = write(folder, fmt, shape, copies)
    return str(folder / "model.onnx"), stored


def probe(model: str, loader: str, rows: int, threads: int) -> dict[str, float]:
    """What `edgec.bench.probe` answers in a fresh process. model: path of a graph, "" for the runtime alone. Raises
    BenchError.
    """
    job = {"model": model, "loader": loader, "rows": rows, "threads": threads, "seconds": _SECONDS}
    finished = run(
        [sys.executable, "-P", "-m", "edgec.bench.probe"],
        stdin=json.dumps(job).encode(),
        env=worker_environment(threads),
        timeout_s=_TIMEOUT_S,
    )
    if not finished.ok:
        raise BenchError(f"the runtime could not be measured: {finished.reason()}")
    told: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    if not all(math.isfinite(value) and value > 0 for value in told.values()):
        raise BenchError(f"the runtime could not be measured: its probe answered {told}")
    return told
