"""Timings of single low-bit matmuls on ggml's kernels, as llama.cpp runs them: the twin of `edgec.bench.microbench`.

Weights lie in the memory that llama.cpp would choose, repacked where this CPU has a faster form of their type. Types of
equal size differ by that, so every type is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from edgec.bench.microbench import ROWS, SHAPES, Contestant, Sample, interleaved, node_count
from edgec.quantize import ggml
from edgec.quantize.ggml_formats import NUMBERS, real_type
from edgec.runtime.ggml.library import F32
from edgec.runtime.ggml.tensors import Allocator, Buffer, Context, Device, Tensor

_STORED = {"int4-b32": "Q4_0", "int8-b32": "Q8_0", "fp16": "F16"}
"""Formats that are ggml's types under other names."""
_TILE = 4
"""Rows of random weights that are quantised [count]; a matrix repeats them, for a kernel does not look."""


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
    contestants: list[Contestant] = []
    for name in formats:
        kind = _STORED.get(name, name.upper())
        for n, k in shapes:
            if real_type(kind, k) != kind:
                continue
            for m in rows:
                products = node_count(n, k, m)
                graph = _Products(device, kind, (n, k), m, products)
                contestants.append(((n, k, name, m), products, graph.milliseconds))
    return interleaved(_Graph(device, 32, 1).milliseconds, contestants, seconds, progress)


class _Graph:
    """Nodes on one x [rows, k], with their memory. Here one sum, next to nothing: what a call costs."""

    def __init__(self, device: Device, k: int, rows: int, nodes: int = 1) -> None:
        self.device, self.rng = device, np.random.default_rng(0)
        self._inputs = Context(device.lib, 1)
        self.context = Context(device.lib, nodes, nodes=nodes + 1)  # of a graph's size are its leaves, too: x as well
        self.x = self._inputs.new(F32, k, rows)
        self._x_memory = device.allocate(self._inputs, "inputs")
        device.write(self.x, self.rng.standard_normal((rows, k)).astype(np.float32))
        self._graph = self.context.graph()
        for output in self.outputs():
            device.lib.build_forward_expand(self._graph, output)
        self._allocator = Allocator(device)
        self._allocator.place(self._graph)

    def outputs(self) -> list[Tensor]:
        return [self.device.lib.add(self.context.pointer, self.x, self.x)]

    def milliseconds(self) -> float:
        begun = time.perf_counter()
        self.device.compute(self._graph)
        return 1e3 * (time.perf_counter() - begun)


class _Products(_Graph):
    """Equal products with matrices [n, k] of their own."""

    def __init__(self, device: Device, kind: str, shape: tuple[int, int], rows: int, products: int) -> None:
        self.kind, self.shape, self.products = kind, shape, products
        super().__init__(device, shape[1], rows, products)

    def outputs(self) -> list[Tensor]:
        self._matrices, self._memory = self._weights()
        pointer = self.context.pointer
        return [self.device.lib.mul_mat(pointer, weight, self.x) for weight in self._matrices]

    def _weights(self) -> tuple[list[Tensor], Buffer]:
        (n, k), number = self.shape, NUMBERS[self.kind]
        packed = (m for m in self.device.packed_memory() if self.device.takes_product(m, number, n, k))
        self._heads = Context(self.device.lib, self.products)
        weights = [self._heads.new(number, k, n) for _ in range(self.products)]
        memory = self.device.allocate(self._heads, "weights", next(packed, None))
        tile = self.rng.standard_normal((_TILE, k)).astype(np.float32)
        codes = ggml.library().quantize(tile, self.kind, np.ones(k, np.float32))
        whole = np.ascontiguousarray(np.resize(codes, (n, codes.shape[1])))
        for weight in weights:
            self.device.write(weight, whole)
        return weights, memory
