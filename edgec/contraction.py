"""The load-bearing wall: what a decomposition computes, as a tiny program that every backend lowers.

A decomposition of a weight W [out, in] is a set of named cores and a `Contraction`: steps that compute
y = W x without ever forming W. Each backend (numpy reference here, torch, ONNX, ggml) implements the
few methods of `Ops` once; `run` drives it. A new decomposition is therefore a new file that emits these
steps, and a new backend is a new `Ops`; neither knows the other. An einsum string per layer was turned
down: it says nothing about the order of contraction, about the layout of a core in memory, or about
which products a quantised matmul kernel can take.

x has any leading axes (batch, sequence), which a step never touches, and at most `MAX_TRAILING` trailing ones,
so that every tensor is at most 4-D once the leading axes are merged, as ggml wants.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgec.errors import PlanError

MAX_TRAILING = 3

Array = NDArray[Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Reshape:
    """Rearrange the trailing axes to `shape`, row-major; their product stays."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Transpose:
    """Permute the trailing axes; `perm` counts from the first trailing axis."""

    perm: tuple[int, ...]


@dataclass(frozen=True)
class MatMul:
    """y = x coreᵀ on the last axis: x [..., k], core [n, k], contiguous and quantised along k → y [..., n]."""

    core: str
    n: int
    k: int


@dataclass(frozen=True)
class BlockMatMul:
    """One small matrix per group: x [..., g·b], core [g, b, b] → y [..., g·b], y[g, i] = Σ_j core[g, i, j] x[g, j].

    x has no other trailing axis, so that its groups and blocks still fit in the axes that backends have.
    """

    core: str
    g: int
    b: int


@dataclass(frozen=True)
class Scale:
    """Broadcast product with a vector on the last axis: x [..., n], core [n] → y [..., n]."""

    core: str
    n: int


@dataclass(frozen=True)
class ReduceSum:
    """Sum over one trailing axis (counted from the first trailing one); the axis goes away."""

    axis: int


@dataclass(frozen=True)
class Gather:
    """Rows by token id: ids [...] (integers, no trailing axis), core [v, n], quantised along n → y [..., n]."""

    core: str
    v: int
    n: int


@dataclass(frozen=True)
class Sum:
    """Each branch runs on the same input; their outputs, of one shape, are added (backbone + correction)."""

    branches: tuple[tuple[Step, ...], ...]


Step = Reshape | Transpose | MatMul | BlockMatMul | Scale | ReduceSum | Gather | Sum


@dataclass(frozen=True)
class Contraction:
    """steps take x [..., in_features] (or token ids, when the first step is a Gather) to y [..., out_features]."""

    out_features: int
    in_features: int
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise PlanError("a contraction needs at least one step")
        if not _ids_only_looked_up(self.steps, self.lookup):
            raise PlanError("a contraction computes with token ids, or looks up numbers")
        trailing = infer_shape(self.steps, self.start)
        if trailing != (self.out_features,):
            raise PlanError(f"contraction ends with trailing axes {trailing}, expected ({self.out_features},)")

    @property
    def lookup(self) -> bool:
        """Does it take token ids? (An embedding's backbone + correction starts with a Sum of Gathers.)"""
        return isinstance(next(walk(self.steps), None), Gather)

    @property
    def start(self) -> tuple[int, ...]:
        """Trailing axes of the input: (in_features,), or () for token ids."""
        return () if self.lookup else (self.in_features,)


class Ops(Protocol[T]):
    """What a backend implements, once. `x` is whatever the backend calls a tensor; `core` is a core's name."""

    def reshape(self, x: T, shape: tuple[int, ...], trailing: int) -> T: ...
    def transpose(self, x: T, perm: tuple[int, ...]) -> T: ...
    def matmul(self, x: T, core: str) -> T: ...
    def block_matmul(self, x: T, core: str) -> T: ...
    def scale(self, x: T, core: str) -> T: ...
    def reduce_sum(self, x: T, axis: int, trailing: int) -> T: ...
    def gather(self, ids: T, core: str) -> T: ...
    def add(self, x: T, y: T) -> T: ...


def run(steps: Sequence[Step], ops: Ops[T], x: T, trailing: tuple[int, ...]) -> T:
    """Drive a backend through the steps. trailing: the shape of x's trailing axes (() for token ids)."""
    for step in steps:
        match step:
            case Reshape(shape):
                x = ops.reshape(x, shape, len(trailing))
            case Transpose(perm):
                x = ops.transpose(x, perm)
            case MatMul(core):
                x = ops.matmul(x, core)
            case BlockMatMul(core):
                x = ops.block_matmul(x, core)
            case Scale(core):
                x = ops.scale(x, core)
            case ReduceSum(axis):
                x = ops.reduce_sum(x, axis, len(trailing))
            case Gather(core):
                x = ops.gather(x, core)
            case Sum(branches):
                parts = [run(branch, ops, x, trailing) for branch in branches]
                x = parts[0]
                for part in parts[1:]:
                    x = ops.add(x, part)
        trailing = _step_shape(step, trailing)
    return x


def infer_shape(steps: Sequence[Step], trailing: tuple[int, ...]) -> tuple[int, ...]:
    """Trailing axes after the steps. Raises PlanError naming the step that does not fit."""
    for step in steps:
        trailing = _step_shape(step, trailing)
        if len(trailing) > MAX_TRAILING:
            raise PlanError(f"{step} leaves {len(trailing)} trailing axes; at most {MAX_TRAILING} may be alive")
    return trailing


def _ids_only_looked_up(steps: Sequence[Step], ids: bool) -> bool:
    """Shapes do not tell token ids from numbers; a backend may end the process for the wrong ones."""
    for step in steps:
        if isinstance(step, Sum):
            if not all(_ids_only_looked_up(branch, ids) for branch in step.branches):
                return False
        elif isinstance(step, Gather) != ids:
            return False
        ids = False
    return True


def _step_shape(step: Step, trailing: tuple[int, ...]) -> tuple[int, ...]:
    """Trailing axes after one step."""
    match step:
        case Reshape(shape):
            fits, after = min(shape, default=1) >= 1 and math.prod(shape) == math.prod(trailing), shape
        case Transpose(perm):
            fits = sorted(perm) == list(range(len(trailing)))
            after = tuple(trailing[p] for p in perm) if fits else ()
        case MatMul(_, n, k):
            fits, after = bool(trailing) and trailing[-1] == k, (*trailing[:-1], n)
        case BlockMatMul(_, g, b):
            fits, after = trailing == (g * b,), trailing
        case Scale(_, n):
            fits, after = bool(trailing) and trailing[-1] == n, trailing
        case ReduceSum(axis):
            fits, after = 0 <= axis < len(trailing), trailing[:axis] + trailing[axis + 1 :]
        case Gather(_, _, n):
            fits, after = trailing == (), (n,)
        case Sum(branches):
            ends = {infer_shape(branch, trailing) for branch in branches}
            fits, after = len(ends) == 1, next(iter(ends), ())
    if not fits:
        raise PlanError(f"{step} does not fit an input with trailing axes {trailing}")
    return after


def core_shapes(contraction: Contraction) -> dict[str, tuple[int, ...]]:
    """Shape of every core, in the order in which the steps use them."""
    shapes: dict[str, tuple[int, ...]] = {}
    shape: tuple[int, ...]
    for step in walk(contraction.steps):
        match step:
            case MatMul(core, n, k):
                shape = (n, k)
            case BlockMatMul(core, g, b):
                shape = (g, b, b)
            case Scale(core, n):
                shape = (n,)
            case Gather(core, v, n):
                shape = (v, n)
            case _:
                continue
        if shapes.setdefault(core, shape) != shape:
            raise PlanError(f"core {core!r} is used as {shapes[core]} and as {shape}")
    return shapes


def quantisable(contraction: Contraction) -> frozenset[str]:
    """Names of the cores that a low-bit matmul or lookup kernel can take; the others are stored as fp16."""
    return frozenset(step.core for step in walk(contraction.steps) if isinstance(step, MatMul | Gather))


def parameters(contraction: Contraction) -> int:
    """Σ factor parameters [count]."""
    return sum(math.prod(shape) for shape in core_shapes(contraction).values())


def flops(contraction: Contraction) -> int:
    """Multiply-adds × 2 for one row of x. Rearranging is counted as free here; a runtime's cost model may disagree."""
    return _flops(contraction.steps, contraction.start)


def widest(contraction: Contraction) -> int:
    """Most numbers that one row of x becomes between two steps: a chain of sound steps can still explode."""
    return _widest(contraction.steps, contraction.start)


def _widest(steps: Sequence[Step], trailing: tuple[int, ...]) -> int:
    most = 1
    for step in steps:
        if isinstance(step, Sum):
            most = max(most, *(_widest(branch, trailing) for branch in step.branches))
        trailing = _step_shape(step, trailing)
        most = max(most, math.prod(trailing))
    return most


def _flops(steps: Sequence[Step], trailing: tuple[int, ...]) -> int:
    total = 0
    for step in steps:
        match step:
            case MatMul(_, n, k):
                total += 2 * n * k * math.prod(trailing[:-1])
            case BlockMatMul(_, g, b):
                total += 2 * g * b * b
            case Scale():
                total += math.prod(trailing)
            case ReduceSum():
                total += math.prod(trailing)
            case Sum(branches):
                total += sum(_flops(branch, trailing) for branch in branches)
            case _:
                pass
        trailing = _step_shape(step, trailing)
    return total


def walk(steps: Sequence[Step]) -> Iterator[Step]:
    """Every step, those inside the branches of a Sum too."""
    for step in steps:
        if isinstance(step, Sum):
            for branch in step.branches:
                yield from walk(branch)
        else:
            yield step


class NumpyOps:
    """The reference backend: float64 unless the cores say otherwise. Slow and plain on purpose."""

    def __init__(self, cores: Mapping[str, Array]) -> None:
        self.cores = cores

    def reshape(self, x: Array, shape: tuple[int, ...], trailing: int) -> Array:
        return x.reshape(x.shape[: x.ndim - trailing] + shape)

    def transpose(self, x: Array, perm: tuple[int, ...]) -> Array:
        lead = x.ndim - len(perm)
        return x.transpose(*range(lead), *(lead + p for p in perm))

    def matmul(self, x: Array, core: str) -> Array:
        product: Array = x @ self.cores[core].T
        return product

    def block_matmul(self, x: Array, core: str) -> Array:
        g, b, _ = self.cores[core].shape
        product: Array = np.einsum("...gj,gij->...gi", x.reshape(*x.shape[:-1], g, b), self.cores[core])
        return product.reshape(x.shape)

    def scale(self, x: Array, core: str) -> Array:
        product: Array = x * self.cores[core]
        return product

    def reduce_sum(self, x: Array, axis: int, trailing: int) -> Array:
        total: Array = x.sum(axis=x.ndim - trailing + axis)
        return total

    def gather(self, ids: Array, core: str) -> Array:
        rows: Array = self.cores[core][ids]
        return rows

    def add(self, x: Array, y: Array) -> Array:
        total: Array = x + y
        return total


def evaluate(contraction: Contraction, cores: Mapping[str, Array], x: Array) -> Array:
    """Reference value of the contraction: x [..., in] (or integer ids) → y [..., out], in the cores' dtype."""
    return run(contraction.steps, NumpyOps(cores), x, contraction.start)


def dense(contraction: Contraction, cores: Mapping[str, Array]) -> Array:
    """The matrix W [out, in] (or table [v, n]) that the cores stand for. For tests and errors, never at run time."""
    first = next(walk(contraction.steps))
    if isinstance(first, Gather):
        return evaluate(contraction, cores, np.arange(first.v))
    dtype = next(iter(cores.values())).dtype
    return evaluate(contraction, cores, np.eye(contraction.in_features, dtype=dtype)).T
