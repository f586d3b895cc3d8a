"""Round to nearest, block by block: needs no data, and is the floor that everything else has to beat."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.moments import SecondMoment
from edgec.quantize.formats import (
    CoreFormat,
    QuantizedTensor,
    block_grid,
    encode,
    pad_blocks,
    storable_scales,
    stored_codes,
)

_CHUNK_VALUES = 1 << 21
"""Values quantised at a time [count]: keeps the temporaries of the scale search in the tens of MB."""


def quantize(core: NDArray[Any], fmt: CoreFormat, second_moment: SecondMoment | None = None) -> QuantizedTensor:
    """core [n, k] → QuantizedTensor. second_moment of the core's input: its diagonal weighs
    the scale search, nothing else."""
    n, k = core.shape
    importance = None
    if second_moment is not None:
        importance = pad_blocks(second_moment.diagonal[None, :], fmt)
    rows = max(1, _CHUNK_VALUES // max(1, k))
    starts = range(0, n, rows)
    # numpy releases the GIL; the order of the parts is kept, so the result is deterministic.
    with ThreadPoolExecutor(max_workers=2) as pool:
        parts = list(pool.map(lambda i: _quantize_rows(core[i : i + rows], fmt, importance), starts))
    codes = np.concatenate([p[0] for p in parts])
    scales = np.concatenate([p[1] for p in parts])
    zeros = np.concatenate([p[2] for p in parts])
    return QuantizedTensor(fmt, (n, k), codes, storable_scales(scales), zeros if fmt.zero_points else None)


def _quantize_rows(
    core: NDArray[Any], fmt: CoreFormat, importance: NDArray[np.float32] | None
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    blocks = pad_blocks(core, fmt)
    scales, zeros = block_grid(blocks, fmt, importance)
    codes = stored_codes(encode(blocks, scales[..., None], zeros[..., None], fmt), fmt)
    return codes.reshape(core.shape[0], -1), scales, zeros.astype(np.uint8)
