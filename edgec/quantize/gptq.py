"""GPTQ (Frantar et al. 2023, arXiv 2210.17323, Algorithm 1): each column's rounding error is pushed into the
columns not yet rounded, along the inverse second moment of the input, so that the error of the *output* W x stays
small.

Columns keep their order: the reordering of the original (`act_order`) needs a g_idx input, which disables
MatMulNBits' packed kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.moments import SecondMoment
from edgec.quantize.formats import (
    CoreFormat,
    QuantizedTensor,
    block_grid,
    encoder,
    pad_blocks,
    storable_scales,
    stored_codes,
)
from edgec.quantize.rtn import quantize as rtn


def quantize(core: NDArray[Any], fmt: CoreFormat, second_moment: SecondMoment | None = None) -> QuantizedTensor:
    """core [n, k], second_moment of the core's input (k wide) → QuantizedTensor. Without one, falls back to RTN."""
    if second_moment is None:
        return rtn(core, fmt)
    n, k = core.shape
    feedback, importance = second_moment.feedback, second_moment.diagonal

    work = np.ascontiguousarray(core.T, dtype=np.float32)  # [k, n]: one column of the core is one contiguous row here
    codes = np.empty((fmt.blocks(k) * fmt.block, n), np.uint8)
    scales = np.zeros((fmt.blocks(k), n), np.float32)
    zeros = np.full((fmt.blocks(k), n), fmt.zero, np.float32)
    for block in range(fmt.blocks(k)):
        start, stop = block * fmt.block, min((block + 1) * fmt.block, k)
        group = pad_blocks(work[start:stop].T, fmt)[:, 0]
        weights = pad_blocks(importance[None, start:stop], fmt)[:, 0]
        scales[block], zeros[block] = block_grid(group, fmt, weights)
        errors = np.empty((stop - start, n), np.float32)
        within = np.ascontiguousarray(feedback[start:stop, start:stop].T)
        encode = encoder(scales[block], zeros[block], fmt)
        for j, column in enumerate(range(start, stop)):
            # What the block's earlier columns push into this one, when it is needed: one product that reads their
            # errors once, where pushing from each into all later ones would rewrite the block for every column.
            work[column] -= within[j, :j] @ errors[:j]
            level = encode(work[column])
            codes[column] = stored_codes(level, fmt)
            errors[j] = (work[column] - (level - zeros[block]) * scales[block]) / within[j, j]
        work[stop:] -= feedback[start:stop, stop:].T @ errors
    codes[k:] = zeros[-1]
    zero_points = np.ascontiguousarray(zeros.T).astype(np.uint8) if fmt.zero_points else None
    # block_grid already rounded the scales to fp16 (or fp32) block by block. All of them together can only fall back to
    # fp32, which is exact, or round a column of scales below fp16's normal range, which the largest ones drown.
    return QuantizedTensor(fmt, (n, k), np.ascontiguousarray(codes.T), storable_scales(scales.T.copy()), zero_points)
