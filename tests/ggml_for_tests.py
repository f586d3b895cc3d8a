"""Small graphs on ggml, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.contraction import Contraction
from edgec.runtime.ggml.library import F16, F32, I32
from edgec.runtime.ggml.ops import lower, node_count
from edgec.runtime.ggml.tensors import Allocator, Context, Device, Tensor

KINDS = {np.dtype(np.float32): F32, np.dtype(np.float16): F16, np.dtype(np.int32): I32}


class Arrays:
    """Cores from numpy arrays, all in plain memory."""

    def __init__(self, device: Device, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.context = Context(device.lib, len(arrays))
        self.tensors = {n: self.context.new(KINDS[a.dtype], *reversed(a.shape)) for n, a in arrays.items()}
        self.buffer = device.allocate(self.context, "cores")
        for name, array in arrays.items():
            device.write(self.tensors[name], np.ascontiguousarray(array))

    def product(self, core: str) -> Tensor:
        return self.tensors[core]

    plain = product


def evaluate_on_ggml(
    contraction: Contraction,
    cores: Mapping[str, NDArray[Any]],
    x: NDArray[Any],
    threads: int = 1,
    gpu: int | None = None,
) -> NDArray[np.float32]:
    """x [T, in] float32 (or ids [T] int32) → y [T, out]."""
    device = Device(threads, gpu)
    stored = Arrays(device, {**cores, " x": x})
    nodes = node_count(contraction) + 8
    context = Context(device.lib, nodes, nodes)
    graph = context.graph()
    y = lower(device.lib, context.pointer, contraction, stored, stored.product(" x"), len(x))
    device.lib.build_forward_expand(graph, y)
    device.require(graph)
    allocator = Allocator(device)
    allocator.place(graph)
    device.compute(graph)
    out = np.empty((len(x), contraction.out_features), np.float32)
    device.read(y, out)
    return out
