"""Timings of single low-bit matmuls on ggml's kernels, as llama.cpp runs them: the twin of `edgec.bench.microbench`.

Weights lie in the memory that llama.cpp would choose, repacked where this CPU has a faster form of their type: Q4_0 and
Q4_K then read twice as fast as types of the same size that have none, which bits alone do not tell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.bench.microbench import RESOLUTION_MS, ROWS, SHAPES, Sample, node_count, undisturbed
from edgec.quantize import ggml
from edgec.quantize.formats import CoreFormat
from edgec.quantize.ggml_formats import NUMBERS, row_bytes
from edgec.runtime.ggml.library import F32
from edgec.runtime.ggml.tensors import Allocator, Buffer, Context, Device, Tensor

_STORED = {"int4-b32": "Q4_0", "int8-b32": "Q8_0", "fp16": "F16"}
"""Formats that are ggml's types under other names."""
_TILE = 4
"""Rows of random weights that are quantised [count]; a matrix repeats them, for a kernel does not look."""
_LEAST_ROUNDS = 5


def measure(
    formats: Sequence[str],
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    *,
    threads: int = 1,
    seconds: float = 40.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """One sample per format, number of rows and shape, but for rows of a matrix that a type's blocks do not divide.

    formats: as plans name them ("q4_k", "int4-b32"). seconds: how long rounds are repeated (at least 5 of them).
    Raises RuntimeUnavailableError without llama-cpp-python.
    """
    device = Device(threads)
    rng = np.random.default_rng(0)
    empty = _Graph(device, None, (1, 32), 1, 1, rng)
    contestants = [
        ((n, k, name, m), _Graph(device, kind, (n, k), m, node_count(n, k, m), rng))
        for name, kind in ((name, _STORED.get(name, name.upper())) for name in formats)
        for n, k in shapes
        if CoreFormat.parse(name).stored_bytes((1, k)) == _bytes_of_a_row(kind, k)
        for m in rows
    ]
    times: list[list[float]] = [[] for _ in contestants]
    calls: list[float] = []
    until, done = time.perf_counter() + seconds, 0
    while done <= _LEAST_ROUNDS or time.perf_counter() < until:
        calls.append(empty.milliseconds())
        for found, (_, graph) in zip(times, contestants, strict=True):
            found.append(graph.milliseconds())
        done += 1
        if progress:
            share = 1 - max(0.0, until - time.perf_counter()) / seconds
            progress(int(100 * share), 100)
    call = undisturbed(calls)
    return [
        (*key, max((undisturbed(found) - call) / graph.products, RESOLUTION_MS))
        for (key, graph), found in zip(contestants, times, strict=True)
    ]


def _bytes_of_a_row(kind: str, k: int) -> int:
    """0 where the type's blocks do not divide it."""
    block = ggml.library().blocks[kind]
    return row_bytes(kind, k) if k % block == 0 else 0


@dataclass
class _Graph:
    """Equal products of one x [rows, k] with matrices [n, k] of their own; one sum without a kind."""

    device: Device
    kind: str | None
    shape: tuple[int, int]
    rows: int
    products: int
    rng: np.random.Generator

    def __post_init__(self) -> None:
        lib, k = self.device.lib, self.shape[1]
        self._context = context = Context(lib, 4 + 2 * self.products, nodes=8 + 2 * self.products)
        self._inputs = inputs = Context(lib, 1)
        x = inputs.new(F32, k, self.rows)
        self._kept: list[Any] = [self.device.allocate(inputs, "inputs")]
        self.device.write(x, self.rng.standard_normal((self.rows, k)).astype(np.float32))
        self._graph = context.graph()
        if self.kind is None:
            outputs = [lib.add(context.pointer, x, x)]
        else:
            weights, buffer = self._weights(self.kind)
            self._kept.append(buffer)
            outputs = [lib.mul_mat(context.pointer, weight, x) for weight in weights]
        for output in outputs:
            lib.build_forward_expand(self._graph, output)
        self._allocator = Allocator(self.device)
        self._allocator.place(self._graph)

    def milliseconds(self) -> float:
        begun = time.perf_counter()
        self.device.compute(self._graph)
        return 1e3 * (time.perf_counter() - begun)

    def _weights(self, kind: str) -> tuple[list[Tensor], Buffer]:
        (n, k), number = self.shape, NUMBERS[kind]
        packed = (m for m in self.device.packed_memory() if self.device.takes_product(m, number, n, k))
        context = Context(self.device.lib, self.products)
        self._kept.append(context)
        weights = [context.new(number, k, n) for _ in range(self.products)]
        buffer = self.device.allocate(context, "weights", next(packed, None))
        tile = self.rng.standard_normal((_TILE, k)).astype(np.float32)
        codes = ggml.library().quantize(tile, kind, np.ones(k, np.float32))
        whole = np.ascontiguousarray(np.resize(codes, (n, codes.shape[1])))
        for weight in weights:
            self.device.write(weight, whole)
        return weights, buffer
