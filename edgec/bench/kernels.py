"""What one weight of each number format costs the runtime on this machine, in time and in memory: a measured rate that
estimates are made from before an artifact exists.

One graph per format holds a stack of equal matrix products with random weights, together as large as the model's own
(so that caches help as much as they will), and runs in a fresh process (`edgec.bench.probe`). A plain copy benchmark
of memory bandwidth was turned down as the only measure: 2-, 4- and 8-bit kernels are not equally near to it, and at
the rows of a sentence none of them is bound by memory.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

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
    task: str, formats: Sequence[str], shape: tuple[int, int], weights: int, rows: int, threads: int = 0
) -> RuntimeRates:
    """Measure the runtime that executes `task`, and one probe per format, a fresh process each (about a second).

    shape: (out, in) of the typical matrix. weights: of all of the model's matrices together. Raises BenchError.
    """
    threads = threads or physical_cores()
    load = os.getloadavg()[0] / physical_cores()
    loader = "genai" if task == CAUSAL_LM else "ort_encoder"
    empty = _probe("", loader, rows, threads)["runtime_rss_bytes"]
    rates = {}
    with tempfile.TemporaryDirectory(prefix="edgec-probe-") as folder:
        _write(Path(folder) / "least.onnx", CoreFormat(32), 32, 32, 1)
        least = _probe(str(Path(folder) / "least.onnx"), "ort_encoder", rows, threads)
        session = max(0.0, least["peak_rss_bytes"] - least["runtime_rss_bytes"])
        for name in dict.fromkeys(formats):
            n, k = shape
            copies = max(1, round(min(max(weights, MIN_WEIGHTS), MAX_WEIGHTS) / (n * k)))
            path = Path(folder) / f"{name}.onnx"
            stored = _write(path, CoreFormat.parse(name), n, k, copies)
            told = _probe(str(path), "ort_encoder", rows, threads)
            path.with_suffix(".onnx.data").unlink()
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


def _probe(model: str, loader: str, rows: int, threads: int) -> dict[str, float]:
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


def _write(path: Path, fmt: CoreFormat, n: int, k: int, copies: int) -> int:
    """x [rows, k] → the last column of `copies` products; returns the stored bytes of all weights."""
    generator = np.random.default_rng(0)
    nodes, weights, ends = [], [], []
    for i in range(copies):
        inputs = ["x"]
        if fmt.quantised:
            blocks = fmt.blocks(k)
            codes = generator.integers(0, 256, (n, blocks, fmt.block * fmt.bits // 8), dtype=np.uint8)
            scales = np.full((n, blocks), 0.01, np.float16)
            weights += [_tensor(f"codes{i}", codes), _tensor(f"scales{i}", scales)]
            nodes.append(helper.make_node("Cast", [f"scales{i}"], [f"wide{i}"], to=TensorProto.FLOAT))
            inputs += [f"codes{i}", f"wide{i}"]
            attributes: dict[str, Any] = {"K": k, "N": n, "bits": fmt.bits, "block_size": fmt.block}
            attributes["accuracy_level"] = 4
            nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{i}"], domain="com.microsoft", **attributes))
        else:
            # fp16 is stored and cast once when the session is created, as edgec's exports do.
            values = generator.standard_normal((k, n), dtype=np.float32)
            weights.append(_tensor(f"w{i}", values.astype(np.float16 if fmt.bits == 16 else np.float32)))
            nodes.append(helper.make_node("Cast", [f"w{i}"], [f"wide{i}"], to=TensorProto.FLOAT))
            nodes.append(helper.make_node("MatMul", ["x", f"wide{i}"], [f"y{i}"]))
        # One column of each product keeps every product alive without adding up whole matrices.
        nodes.append(helper.make_node("Gather", [f"y{i}", "last"], [f"end{i}"], axis=1))
        ends.append(f"end{i}")
    nodes.append(helper.make_node("Concat", ends, ["out"], axis=1))
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", k])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["rows", copies])],
        [*weights, helper.make_tensor("last", TensorProto.INT64, [1], [n - 1])],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save_model(model, str(path), save_as_external_data=True, location=path.name + ".data", size_threshold=1024)
    return copies * fmt.stored_bytes((n, k))


def _tensor(name: str, values: NDArray[Any]) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(values, name)
