"""GPTQ, then coordinate descent: every code and scale of a core is revisited, knowing the errors of all the others.

GPTQ rounds every column once, each knowing only the errors before it, on scales that were chosen before any rounding.
The error of the output is a square in the codes and in the scales alike, so either can be improved with all the others
held: a column's best codes are its values plus what the errors of *all* other columns ask of it, rounded (QuantEase,
Behdin et al. 2023, arXiv 2309.01885, Algorithm 2), and a block's best scale is a quotient of two sums. Two sweeps over
both take 27 % off GPTQ's squared output error at 2 bits, 18 % at 4 and 11 % at 8 on a small Llama (five: 30, 20 and
12 %), for two to five times GPTQ's time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas

from edgec.moments import DAMPING, SecondMoment
from edgec.quantize import gptq
from edgec.quantize.formats import CoreFormat, QuantizedTensor, encoder, storable_scales, stored_codes

Array = NDArray[Any]

_CHUNK_VALUES = 1 << 22
"""Values improved at a time [count], some rows of a core: three arrays of so many floats, and of H, are in memory."""


def quantize(
    core: Array, fmt: CoreFormat, second_moment: SecondMoment | None = None, *, sweeps: int = 2
) -> QuantizedTensor:
    """core [n, k], second_moment of the core's input (k wide) → QuantizedTensor, with an output error below GPTQ's.

    Without a second moment, rounded to nearest; in fp8, whose grid is not even, GPTQ's.
    """
    start = gptq.quantize(core, fmt, second_moment)
    if second_moment is None or fmt.fp8:
        return start
    h = second_moment.damped(DAMPING)
    rows = max(1, _CHUNK_VALUES // core.shape[1])
    codes, scales = start.codes.copy(), start.scales.astype(np.float32)
    for chunk in (slice(first, first + rows) for first in range(0, len(core), rows)):
        zeros = None if start.zero_points is None else start.zero_points[chunk]
        descent = _Descent(core[chunk], codes[chunk], scales[chunk], zeros, fmt, h)
        for _ in range(sweeps):
            descent.sweep()
        codes[chunk, : core.shape[1]], scales[chunk] = descent.codes(), descent.scales.T
    return QuantizedTensor(fmt, start.shape, codes, storable_scales(scales), start.zero_points)


class _Descent:
    """Some rows of a core. Everything is kept with columns first: one column of the core is one contiguous row here.

    levels [k, n]: codes less their zero. values [k, n]: what they stand for. pull [k, n]: H (core − values)ᵀ, half the
    negative gradient of the error in the values.
    """

    def __init__(
        self,
        core: Array,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        zeros: NDArray[np.uint8] | None,
        fmt: CoreFormat,
        h: NDArray[np.float32],
    ) -> None:
        self.fmt, self.h, k = fmt, h, core.shape[1]
        self.blocks = [slice(start, min(start + fmt.block, k)) for start in range(0, k, fmt.block)]
        self.scales = np.ascontiguousarray(scales.T)
        self.zeros = np.full(self.scales.shape, fmt.zero, np.float32)
        if zeros is not None:
            self.zeros[:] = zeros.T
        self.levels = np.ascontiguousarray(codes[:, :k].T, np.float32)
        self.levels -= self._spread(self.zeros)
        self.values = self.levels * self._spread(self.scales)
        self.pull = h @ (core.T.astype(np.float32) - self.values)

    def sweep(self) -> None:
        """Every scale and every code once, block after block. The error does not rise."""
        for block, own in enumerate(self.blocks):
            before = self.values[own].copy()
            pull = self.pull[own].copy()
            self._rescale(block, pull)
            self._recode(block, pull)
            self._push(own, self.values[own] - before)

    def codes(self) -> NDArray[np.uint8]:
        """[n, k], as `QuantizedTensor` keeps them."""
        return stored_codes((self.levels + self._spread(self.zeros)).T, self.fmt)

    def _spread(self, of_blocks: NDArray[np.float32]) -> NDArray[np.float32]:
        """[blocks, n] → [k, n]."""
        return np.repeat(of_blocks, self.fmt.block, axis=0)[: self.blocks[-1].stop]

    def _rescale(self, block: int, pull: NDArray[np.float32]) -> None:
        """The best scale of a block is as far away as its pull along the levels ÷ the levels' own weight."""
        own = self.blocks[block]
        levels = self.levels[own]
        towards = self.h[own, own] @ levels
        along, weight = np.einsum("kn,kn->n", pull, levels), np.einsum("kn,kn->n", towards, levels)
        best = self.scales[block] + np.divide(along, weight, out=np.zeros_like(along), where=weight > 0)
        step = storable_scales(best).astype(np.float32) - self.scales[block]
        step *= np.abs(step * weight - along) < np.abs(along)  # as stored it may be no nearer than it was
        self.scales[block] += step
        self.values[own] += step * levels
        pull -= step * towards

    def _recode(self, block: int, pull: NDArray[np.float32]) -> None:
        """Column after column; what the earlier columns of the block change in a later one's pull is added when needed:
        one product that reads their steps once, where pushing each into all later ones would rewrite them every time.
        """
        own, scale, zero = self.blocks[block], self.scales[block], self.zeros[block]
        within, encode = self.h[own, own], encoder(scale, zero, self.fmt)
        steps = np.empty_like(pull)
        for j, column in enumerate(range(own.start, own.stop)):
            ask = pull[j]
            ask -= within[j, :j] @ steps[:j]
            ask /= within[j, j]
            ask += self.values[column]
            self.levels[column] = encode(ask) - zero
            np.multiply(self.levels[column], scale, out=ask)
            np.subtract(ask, self.values[column], out=steps[j])
            self.values[column] = ask

    def _push(self, own: slice, steps: NDArray[np.float32]) -> None:
        """A block's steps into every column's pull, in place: numpy would make an array of all of them first."""
        self.pull = blas.sgemm(-1.0, steps.T, self.h[own].T, 1.0, self.pull.T, trans_b=1, overwrite_c=1).T
