"""Timings of single low-bit matmuls on this machine's onnxruntime: what the planner's cost model is fitted to.

`edgec.bench.kernels` asks what a weight costs in a model-sized stack; this asks how the cost depends on shape, format
and rows, for cores as small as a tensor train's. Every shape is one graph of equal nodes on one input, with weights of
their own, so that the cost of calling the session is shared and can be subtracted (an empty graph measures it). All
sessions live in one process and are timed in turn, round after round, so that a slow second of the machine falls on
all of them. The lowest decile is kept, not the median: another process on the machine can only add time, and a product
of a millisecond is interrupted by one far more often than a short one. Graphs are built with onnx's helper, not
exported: nothing but the kernel is wanted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgec.errors import BenchError
from edgec.quantize.formats import CoreFormat
from edgec.runtime.options import import_onnxruntime

Sample = tuple[int, int, str, int, float]
"""(n, k, format, rows, ms): x [rows, k] → [rows, n] with a weight [n, k] in that format; ms of one node."""

Contestant = tuple[tuple[int, int, str, int], int, Callable[[], float]]
"""((n, k, format, rows), equal products in a call, a call that tells its milliseconds)."""

FORMATS = ("int2-b64", "int4-b32", "int4-b64", "int8-b32", "fp32")

SHAPES = ((64, 512), (384, 384), (1536, 384), (384, 1536), (1024, 1024))
"""(n, k) measured in every format: from a train's core to a small model's matrix."""

ROWS = (1, 16, 128)

_MOST_NODES = 32
"""Most equal nodes in one graph."""
_PRODUCTS = 1 << 22
"""About how many multiply-adds the nodes of a graph do together: enough to stand out from the call, and over before
another process gets its turn [count].
"""
_LEAST_ROUNDS = 5
_RESOLUTION_MS = 1e-4


def measure(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    formats: Sequence[str] = FORMATS,
    rows: Sequence[int] = ROWS,
    *,
    threads: int = 1,
    seconds: float = 40.0,
    accuracy_level: int = 4,
    unpacked: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """One sample per shape, format and number of rows. seconds: how long rounds are repeated (at least 5 of them).
    unpacked: quantised cores are multiplied as int8 matrices of one scale a row, whatever their format in the file.

    Raises BenchError naming the shape when the runtime refuses a graph.
    """
    rng = np.random.default_rng(0)
    empty = _session(_empty(), threads, "an empty graph")
    contestants: list[Contestant] = []
    for name in formats:
        fmt = CoreFormat.parse(name)
        for n, k in shapes:
            where = f"a {n}x{k} matmul in {name}"
            for m in rows:
                nodes = node_count(n, k, m)
                if unpacked and fmt.quantised:
                    model = _unpacked(n, k, nodes, rng)
                else:
                    model = _matmuls(n, k, fmt, nodes, accuracy_level, rng)
                x = rng.normal(size=(m, k)).astype(np.float32)
                contestants.append(((n, k, name, m), nodes, partial(_time, _session(model, threads, where), x)))
    idle = np.zeros((1, 32), np.float32)
    return interleaved(lambda: _time(empty, idle), contestants, seconds, progress)


def interleaved(
    empty: Callable[[], float],
    contestants: Sequence[Contestant],
    seconds: float,
    progress: Callable[[int, int], None] | None,
) -> list[Sample]:
    """Rounds of all contestants, one after the other. empty: milliseconds of a call without a product."""
    times: list[list[float]] = [[] for _ in contestants]
    calls: list[float] = []
    until, done = time.perf_counter() + seconds, 0
    while done <= _LEAST_ROUNDS or time.perf_counter() < until:
        calls.append(empty())
        for found, (_, _, milliseconds) in zip(times, contestants, strict=True):
            found.append(milliseconds())
        done += 1
        if progress:
            share = 1 - max(0.0, until - time.perf_counter()) / seconds
            progress(int(100 * share), 100)
    call = _undisturbed(calls)
    return [
        (*key, max((_undisturbed(found) - call) / nodes, _RESOLUTION_MS))
        for (key, nodes, _), found in zip(contestants, times, strict=True)
    ]


def node_count(n: int, k: int, rows: int) -> int:
    """Equal products in one graph."""
    return min(_MOST_NODES, max(1, _PRODUCTS // (n * k * rows)))


def _undisturbed(times: list[float]) -> float:
    return float(np.quantile(times[1:], 0.1))  # the first round warms up


def _time(session: Any, x: NDArray[np.float32]) -> float:
    begun = time.perf_counter()
    session.run(None, {"x": x})
    return 1e3 * (time.perf_counter() - begun)


def _session(model: onnx.ModelProto, threads: int, where: str) -> Any:
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 (onnxruntime's errors share no base class)
        raise BenchError(f"micro-benchmark: onnxruntime refuses {where}: {str(error).splitlines()[0]}") from error


def _matmuls(
    n: int, k: int, fmt: CoreFormat, count: int, accuracy_level: int, rng: np.random.Generator
) -> onnx.ModelProto:
    nodes, constants = [], []
    for i in range(count):
        if not fmt.quantised:
            constants.append(_constant(f"w{i}", rng.normal(size=(k, n)).astype(np.float32)))
            nodes.append(helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]))
            continue
        blocks = -(-k // fmt.block)
        codes = rng.integers(0, 256, (n, blocks, fmt.block * fmt.bits // 8), np.uint8)
        constants += [_constant(f"w{i}", codes), _constant(f"s{i}", np.full((n, blocks), 1e-2, np.float32))]
        attributes: dict[str, Any] = {"K": k, "N": n, "bits": fmt.bits, "block_size": fmt.block}
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                ["x", f"w{i}", f"s{i}"],
                [f"y{i}"],
                domain="com.microsoft",
                accuracy_level=accuracy_level,
                **attributes,
            )
        )
    return _model(nodes, constants, k)


def _unpacked(n: int, k: int, count: int, rng: np.random.Generator) -> onnx.ModelProto:
    """Nodes as onnxruntime makes them of `edgec.export.onnx.int8_products`, each with its input's quantization."""
    nodes, constants = [], []
    for i in range(count):
        codes = rng.integers(-127, 128, (k, n), np.int8)
        constants += [_constant(f"w{i}", codes), _constant(f"s{i}", np.full(n, 1e-3, np.float32))]
        inputs = ["x", f"w{i}", f"s{i}"]
        nodes.append(helper.make_node("DynamicQuantizeMatMul", inputs, [f"y{i}"], domain="com.microsoft"))
    return _model(nodes, constants, k)


def _empty() -> onnx.ModelProto:
    """What every graph has beside its products."""
    return _model([helper.make_node("Identity", ["x"], ["y0"])], [], 32)


def _constant(name: str, array: NDArray[Any]) -> onnx.TensorProto:
    return numpy_helper.from_array(array, name)


def _model(nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], k: int) -> onnx.ModelProto:
    """nodes: each gives one y, of which only the first row reaches the output: all are needed, little is copied."""
    bounds = {"zero": 0, "one": 1}
    constants = [*constants, *(_constant(name, np.array([value], np.int64)) for name, value in bounds.items())]
    tops = [helper.make_node("Slice", [f"y{i}", "zero", "one", "zero"], [f"top{i}"]) for i in range(len(nodes))]
    nodes = [*nodes, *tops, helper.make_node("Sum", [f"top{i}" for i in range(len(nodes))], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", k])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, None])
    graph = helper.make_graph(nodes, "microbench", [x], [y], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
