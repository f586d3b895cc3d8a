"""Milliseconds of a choice on a target, from a cost model fitted to a micro-benchmark of that target's runtime.

Three things take time in a low-bit matmul: reading the core (decode is bound by it), multiplying (prefill is), and
being a node at all (many small cores are). Their prices are the non-negative least-squares solution (Lawson & Hanson
1974, ch. 23) over measured shapes, so that no price is negative where shapes are collinear; misfits are relative, so
that small matmuls count as much as large ones. Counting FLOPs alone was turned
down: it makes a train of tiny cores look free, and prefill and decode look alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from edgec.contraction import BlockMatMul, Contraction, Gather, MatMul, Reshape, Step, Sum, infer_shape
from edgec.errors import PlanError
from edgec.fit import contraction_of, core_formats
from edgec.quantize.formats import CoreFormat, LayerFormat
from edgec.quantize.ggml_formats import GgmlFormat, real_type
from edgec.records import Choice

Sample = tuple[int, int, str, int, float]
"""(n, k, format, rows, ms): one matmul x [rows, k] → [rows, n] with a core [n, k] of that format."""

Kernel = tuple[int, str]
"""(bits, name): what multiplies by a format. ggml has one for every type, onnxruntime one for every number of bits."""

DECODE_ROWS, PREFILL_ROWS = 1, 128
"""Rows of x when a token is generated, and when a prompt (a sentence, for encoders) is read."""

_SMALLEST_MS = 1e-6


def kernel(fmt: CoreFormat, k: int) -> Kernel:
    """Of a core whose rows are k wide."""
    return fmt.bits, real_type(fmt.kind, k) if isinstance(fmt, GgmlFormat) else ""


@dataclass(frozen=True)
class Prices:
    """At one number of rows: byte [ms per stored byte], flop: kernel → [ms per multiply-add × 2], node [ms]."""

    byte: float
    flop: Mapping[Kernel, float]
    node: float

    def matmul(self, n: int, k: int, fmt: CoreFormat, rows: int) -> float:
        """What was not measured costs as the kernel of the nearest bits does."""
        wanted = kernel(fmt, k)
        if wanted not in self.flop:
            wanted = min(self.flop, key=lambda known: (abs(math.log2(known[0] / wanted[0])), known))
        return self.byte * fmt.stored_bytes((n, k)) + self.flop[wanted] * 2.0 * rows * n * k + self.node


@dataclass(frozen=True)
class CostModel:
    """rows → prices. misfit: median relative error of the samples themselves."""

    prices: Mapping[int, Prices]
    misfit: float

    def matmul(self, n: int, k: int, fmt: CoreFormat, rows: int) -> float:
        """Predicted ms of one matmul; between measured numbers of rows, geometric interpolation."""
        known = sorted(self.prices)
        below = max((r for r in known if r <= rows), default=known[0])
        above = min((r for r in known if r >= rows), default=known[-1])
        if below == above:  # beyond what was measured, time grows with the rows; being a node costs the same
            prices = self.prices[below]
            return prices.node + (prices.matmul(n, k, fmt, below) - prices.node) * rows / below
        low, high = (max(self.prices[r].matmul(n, k, fmt, r), _SMALLEST_MS) for r in (below, above))
        weight = math.log(rows / below) / math.log(above / below)
        return math.exp((1 - weight) * math.log(low) + weight * math.log(high))

    def contraction(self, contraction: Contraction, fmt: LayerFormat, rows: int) -> float:
        """Predicted ms of a whole layer for x [rows, in]."""
        return self._steps(contraction.steps, contraction.start, core_formats(contraction, fmt), rows)

    def _steps(
        self, steps: Sequence[Step], trailing: tuple[int, ...], formats: Mapping[str, CoreFormat], rows: int
    ) -> float:
        total, node = 0.0, self.prices[min(self.prices)].node
        for step in steps:
            match step:
                case MatMul(core, n, k):
                    total += self.matmul(n, k, formats[core], rows * math.prod(trailing[:-1]))
                case BlockMatMul(_, g, b):
                    total += 2 * node + self.matmul(g * b, b, CoreFormat(32), rows)
                case Sum(branches):
                    total += sum(self._steps(branch, trailing, formats, rows) for branch in branches)
                    total += node * (len(branches) - 1)
                case Gather() | Reshape():
                    total += node
                case _:  # one node that touches every element once
                    total += node + self.prices[min(self.prices)].byte * 8 * rows * math.prod(trailing)
            trailing = infer_shape((step,), trailing)
        return total

    def choice(self, choice: Choice, rows: int = DECODE_ROWS) -> float:
        """Predicted ms of a plan's choice; a table is looked up, which costs a node."""
        contraction = contraction_of(choice.spec, choice.shape, choice.role)
        return self.contraction(contraction, LayerFormat.parse(choice.format), rows)


def fit_costs(samples: Sequence[Sample]) -> CostModel:
    """Prices from a micro-benchmark. Raises PlanError when there are too few samples to tell prices apart."""
    usable = [s for s in samples if s[4] > 0 and math.isfinite(s[4])]
    by_rows: dict[int, list[Sample]] = {}
    for sample in usable:
        by_rows.setdefault(sample[3], []).append(sample)
    prices, misfits = {}, []
    for rows, group in sorted(by_rows.items()):
        formats = [CoreFormat.parse(name) for _, _, name, _, _ in group]
        of_group = [kernel(fmt, k) for fmt, (_, k, *_) in zip(formats, group, strict=True)]
        kernels = sorted(set(of_group))
        if len(group) < len(kernels) + 2:
            raise PlanError(
                f"{len(group)} timings at {rows} rows cannot give {len(kernels) + 2} prices; measure more shapes"
            )
        # Relative misfits count, but what is far below the usual is nearer to the clock's resolution.
        times = np.array([s[4] for s in group])
        weight = 1 / (times + 0.1 * float(np.median(times)))
        system = np.array(
            [
                [fmt.stored_bytes((n, k)), *(2.0 * rows * n * k * (own == known) for known in kernels), 1.0]
                for fmt, own, (n, k, *_) in zip(formats, of_group, group, strict=True)
            ]
        )
        weighed = system * weight[:, None]
        scale = weighed.max(0)
        found = nnls(weighed / scale, times * weight)[0] / scale
        byte, *flops, node = map(float, found)
        prices[rows] = Prices(byte, dict(zip(kernels, flops, strict=True)), node)
        misfits += list(np.abs(system @ found / times - 1))
    if not prices:
        raise PlanError("no timing of the runtime is usable; run the micro-benchmark again")
    return CostModel(prices, float(np.median(misfits)))


@dataclass(frozen=True)
class Pace:
    """Time as a second objective. ms: predicted milliseconds of a choice. weight: loss that one millisecond is worth.
    cap: most milliseconds of all planned layers together, or None.
    """

    ms: Callable[[Choice], float]
    weight: float = 0.0
    cap: float | None = None

    def of(self, choices: Sequence[Choice]) -> float:
        """Milliseconds of a plan's layers."""
        return sum(map(self.ms, choices))
