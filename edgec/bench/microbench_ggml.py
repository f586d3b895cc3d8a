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
from edgec.quantize.ggml_formats import EXACT, NUMBERS, real_type
from edgec.runtime.ggml.library import F32
from edgec.runtime.ggml.tensors import Allocator, Context, Device

_FLOATS = {"F32": np.float32, "F16": np.float16}
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

    formats: as plans or ggml name them ("q4_k", "int4-b32", "Q4_K", "F16"). seconds: how long rounds are repeated (at
    least 5 of them).
    Raises RuntimeUnavailableError without llama-cpp-python.
    """
    device = Device(threads)
    contestants: list[Contestant] = []
    for name in formats:
        kind = EXACT.get(name, name.upper())
        for n, k in shapes:
            if real_type(kind, k) != kind:
                continue
            for m in rows:
                products = node_count(n, k, m)
                graph = _Graph(device, k, m, _Weights(device, kind, n, k, products))
                contestants.append(((n, k, name, m), products, graph.milliseconds))
    return interleaved(_Graph(device, 32, 1).milliseconds, contestants, seconds, progress)


class _Graph:
    """Nodes on one x [rows, k], with their memory: one sum, next to nothing, which tells what a call costs; or as many
    products with matrices of their own.
    """

    def __init__(self, device: Device, k: int, rows: int, weights: _Weights | None = None) -> None:
        lib, nodes = device.lib, len(weights.tensors) if weights else 1
        self._device, self._weights = device, weights
        self._inputs = Context(lib, 1)
        x = self._inputs.new(F32, k, rows)
        self._memory = device.allocate(self._inputs, "inputs")
        device.write(x, np.random.default_rng(0).standard_normal((rows, k)).astype(np.float32))
        self._context = Context(lib, nodes, nodes=nodes + 1)  # of a graph's size are its leaves, too: x as well
        self._graph, pointer = self._context.graph(), self._context.pointer
        outputs = [lib.mul_mat(pointer, w, x) for w in weights.tensors] if weights else [lib.add(pointer, x, x)]
        for output in outputs:
            lib.build_forward_expand(self._graph, output)
        self._allocator = Allocator(device)
        self._allocator.place(self._graph)

    def milliseconds(self) -> float:
        begun = time.perf_counter()
        self._device.compute(self._graph)
        return 1e3 * (time.perf_counter() - begun)


class _Weights:
    """Matrices [n, k] of one type, where their products are fastest."""

    def __init__(self, device: Device, kind: str, n: int, k: int, count: int) -> None:
        self._context = Context(device.lib, count)
        self.tensors = [self._context.new(NUMBERS[kind], k, n) for _ in range(count)]
        self._memory = device.allocate(self._context, "weights", device.fastest_memory(NUMBERS[kind], n, k))
        tile = np.random.default_rng(1).standard_normal((_TILE, k)).astype(np.float32)
        if kind in _FLOATS:
            codes = tile.astype(_FLOATS[kind]).view(np.uint8)
        else:
            codes = ggml.library().quantize(tile, kind, np.ones(k, np.float32))
        whole = np.ascontiguousarray(np.resize(codes, (n, codes.shape[1])))
        for tensor in self.tensors:
            device.write(tensor, whole)
