"""The contraction wall's third lowering: steps become nodes of a ggml graph on ggml's own kernels.

x [T, a, b, c] in numpy's order is a ggml tensor of sizes (c, b, a, T): at most three trailing axes and the merged
leading one, which is why the wall allows no more. Every tensor between two steps is contiguous, so that a `Reshape`
costs nothing; a `Transpose` costs a copy unless it only moves axes of size one.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Protocol

from edgec.contraction import Contraction, Sum, infer_shape, run
from edgec.runtime.ggml.library import Library
from edgec.runtime.ggml.tensors import Tensor, padded, sizes

NODES_PER_STEP = 8
"""Most tensors that one step adds to a graph (a block product reshapes, permutes and copies twice)."""


class Cores(Protocol):
    """Where cores lie, by name. A table that is also multiplied with may lie in memory twice as it were: as rows in
    the file, and packed.
    """

    def product(self, core: str) -> Tensor: ...
    def plain(self, core: str) -> Tensor: ...


class GgmlOps:
    """`edgec.contraction.Ops` that adds nodes. `tokens`: size of the merged leading axis."""

    def __init__(self, lib: Library, context: int, cores: Cores, tokens: int) -> None:
        self.lib, self.context, self.cores, self.tokens = lib, context, cores, tokens

    def reshape(self, x: Tensor, shape: tuple[int, ...], trailing: int) -> Tensor:
        return self._sized(x, (*reversed(shape), self.tokens))

    def transpose(self, x: Tensor, perm: tuple[int, ...]) -> Tensor:
        ne = sizes(x)
        last = len(perm) - 1
        after = tuple(ne[last - p] for p in reversed(perm))
        if [p for p in perm if ne[last - p] > 1] == sorted(p for p in perm if ne[last - p] > 1):
            return self._sized(x, (*after, self.tokens))
        axes = list(range(4))
        for place, source in enumerate(perm):
            axes[last - source] = last - place
        return self._node("cont", self._node("permute", x, *axes))

    def matmul(self, x: Tensor, core: str) -> Tensor:
        ne = sizes(x)
        rows = self._sized(x, (ne[0], prod(ne[1:])))
        product = self._node("mul_mat", self.cores.product(core), rows)
        return self._sized(product, (sizes(product)[0], *ne[1:]))

    def block_matmul(self, x: Tensor, core: str) -> Tensor:
        blocks = self.cores.plain(core)  # sizes (b in, b out, g)
        b, _, g, _ = sizes(blocks)
        grouped = self._node("cont", self._node("permute", self._sized(x, (b, g, self.tokens)), 0, 2, 1, 3))
        product = self._node("mul_mat", blocks, grouped)
        return self._sized(self._node("cont", self._node("permute", product, 0, 2, 1, 3)), (b * g, self.tokens))

    def scale(self, x: Tensor, core: str) -> Tensor:
        return self._node("mul", x, self.cores.plain(core))

    def reduce_sum(self, x: Tensor, axis: int, trailing: int) -> Tensor:
        ne = sizes(x)
        summed = trailing - 1 - axis
        kept = tuple(ne[i] for i in range(trailing) if i != summed)
        if summed:
            order = [summed, *(i for i in range(4) if i != summed)]
            axes = [order.index(i) for i in range(4)]
            x = self._node("cont", self._node("permute", x, *axes))
        return self._sized(self._node("sum_rows", x), (*kept, self.tokens))

    def gather(self, ids: Tensor, core: str) -> Tensor:
        return self._node("get_rows", self.cores.plain(core), ids)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._node("add", x, y)

    def _sized(self, x: Tensor, ne: tuple[int, ...]) -> Tensor:
        full = padded(ne)
        return x if sizes(x) == full else self._node("reshape_4d", x, *full)

    def _node(self, name: str, *arguments: int) -> Tensor:
        tensor: Tensor = getattr(self.lib, name)(self.context, *arguments)
        return tensor


class NamedCores:
    """The cores of one layer among all tensors: `names` says which tensor each core is."""

    def __init__(self, tensors: Cores, names: Mapping[str, str]) -> None:
        self.tensors, self.names = tensors, names

    def product(self, core: str) -> Tensor:
        return self.tensors.product(self.names[core])

    def plain(self, core: str) -> Tensor:
        return self.tensors.plain(self.names[core])


def lower(
    lib: Library, context: int, contraction: Contraction, cores: Cores, x: Tensor, tokens: int, done: int = 0
) -> Tensor:
    """The nodes of a contraction: x of sizes (in, tokens), or token ids (tokens) → y of sizes (out, tokens).

    done: how many steps x has been through already.
    """
    trailing = infer_shape(contraction.steps[:done], contraction.start)
    return run(contraction.steps[done:], GgmlOps(lib, context, cores, tokens), x, trailing)


def node_count(contraction: Contraction) -> int:
    """Most tensors that `lower` adds."""

    def count(steps: tuple[object, ...]) -> int:
        return sum(
            NODES_PER_STEP + (sum(count(branch) for branch in step.branches) if isinstance(step, Sum) else 0)
            for step in steps
        )

    return count(contraction.steps)
