"""What the device itself can do: bytes per second from its memory, and integer products per second from its cores.

A decode step multiplies every weight once with one vector, so it can be no faster than its weights and its cache come
out of memory. The worker measures that on the device (standard library, numpy and the runtime, no torch), before and
after a bench, as a job of the task `ROOFLINE`. A ceiling is a maximum: the best pass counts, since whatever else the
machine did can only have slowed the others down.

Memory is read only: reductions over a buffer far larger than the caches, a slice per thread (numpy lets go of the
interpreter's lock in them). STREAM's copy and triad were turned down: they write as much as they read, and decoding
does not. Several reductions are tried because none is the fastest on every core.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.errors import BenchError
from edgec.runtime.options import RuntimeOptions, import_onnxruntime, session_options

ROOFLINE = "roofline"
"""The task of the job; its folder holds integer products, each an ONNX file of one input."""

BUFFER_BYTES = 256 << 20
"""Read in one pass [bytes]: several times the last cache of a laptop's or a phone's processor."""
LEAST_BUFFER_BYTES = 16 << 20
ROWS = 256
"""Rows of x in the integer products [count]: a prefill, where weights are read once for many rows."""

_PASSES = 8
_SECONDS = 0.6
"""How long each product is repeated, after three runs at least."""

_Reduction = Callable[[NDArray[Any]], Any]
_REDUCTIONS: Sequence[tuple[type[Any], _Reduction]] = (
    (np.int64, np.max),
    (np.int64, np.bitwise_or.reduce),
    (np.uint8, np.max),
)


def measure(folder: Path, threads: int, ram_limit_bytes: int = 0) -> dict[str, float]:
    """Every ceiling: `read_bytes_s_N` for N threads (1 and `threads`), `run_s_NAME` for each product file NAME.onnx.

    Raises BenchError. A runtime that is not there, or refuses a product, leaves its entries out: memory is still told.
    """
    room = min(BUFFER_BYTES, ram_limit_bytes // 4) if ram_limit_bytes else BUFFER_BYTES
    if room < LEAST_BUFFER_BYTES:
        raise BenchError(
            f"{room} bytes are too few to measure the memory with; allow {4 * LEAST_BUFFER_BYTES} at least"
        )
    found = {f"read_bytes_s_{n}": read_bytes_s(n, room) for n in sorted({1, threads})}
    for path in sorted(folder.glob("*.onnx")):
        seconds = _product_seconds(path, threads)
        if seconds is not None:
            found[f"run_s_{path.stem}"] = seconds
    return found


def read_bytes_s(threads: int, buffer_bytes: int = BUFFER_BYTES) -> float:
    """Bytes per second that so many threads read together: the best of some passes."""
    slices: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * threads
    together = threading.Barrier(threads)
    spans: list[list[tuple[float, float]]] = [[] for _ in range(threads)]
    share = buffer_bytes // (8 * threads)
    passes = [(kind, reduce) for kind, reduce in _REDUCTIONS for _ in range(_PASSES)]

    def reader(number: int) -> None:
        # Filled by the thread that reads it, so that the pages lie in its own node's memory.
        slices[number] = np.full(share, number + 1, np.int64)
        for kind, reduce in passes:
            values = slices[number].view(kind)
            together.wait()
            begun = time.perf_counter()
            reduce(values)
            spans[number].append((begun, time.perf_counter()))

    readers = [threading.Thread(target=reader, args=(number,), daemon=True) for number in range(threads)]
    for thread in readers:
        thread.start()
    for thread in readers:
        thread.join()
    # From the first to begin to the last to end, by the readers' own clocks: another thread wakes late, and would call
    # a pass shorter than it was.
    longest = [max(e for _, e in one) - min(b for b, _ in one) for one in zip(*spans, strict=True)]
    return float(8 * share * threads / min(longest))


def _product_seconds(path: Path, threads: int) -> float | None:
    """The quickest run of a product; None where the runtime is missing or does not have this operator."""
    try:
        ort = import_onnxruntime()
        session = ort.InferenceSession(
            str(path), session_options(RuntimeOptions(threads)), providers=["CPUExecutionProvider"]
        )
        (given,) = session.get_inputs()
        generator = np.random.default_rng(0)
        width = int(given.shape[-1])
        if given.type == "tensor(uint8)":
            x: NDArray[Any] = generator.integers(0, 256, (ROWS, width), np.uint8)
        else:
            x = generator.standard_normal((ROWS, width), dtype=np.float32)
        names = [output.name for output in session.get_outputs()]
        times: list[float] = []
        session.run(names, {given.name: x})
        started = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - started < _SECONDS:
            begun = time.perf_counter()
            session.run(names, {given.name: x})
            times.append(time.perf_counter() - begun)
    except Exception:  # noqa: BLE001 - onnxruntime's errors share no base class; the memory's ceiling is still told
        return None
    return min(times)
