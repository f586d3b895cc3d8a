"""Peers whose numbers are edgec's own core formats: dense ones at a format, factored ones sized to a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from edgec.errors import PlanError
from edgec.fit import fit, stored_bytes
from edgec.moments import SecondMoment
from edgec.peers import Peer, Replacement
from edgec.quantize import gptq
from edgec.quantize.formats import FAST_BLOCKS, CoreFormat
from edgec.quantize.ggml_formats import GgmlFormat
from edgec.records import Spec, Target

_SIMULATED = ("int3-b32", "int3-b64", "int3-b128")
"""Formats that no runtime executes but that papers report; taken where edgec knows them at all."""

_ZERO_POINTS_UP_TO = 4
"""Zero points are offered up to this many bits [bits per code]: at 8 they cost more than they give."""


def dense_formats(target: Target) -> Iterator[CoreFormat]:
    """Every dense format that the target executes, then each with zero points."""
    parsed = [CoreFormat.parse(name) for name in target.dense_formats]
    found = [f for f in parsed if not isinstance(f, GgmlFormat)]  # those are peers of their own family
    yield from found
    yield from (replace(f, zero_points=True) for f in found if f.bits <= _ZERO_POINTS_UP_TO and not f.zero_points)


def simulated_formats() -> Iterator[CoreFormat]:
    for name in _SIMULATED:
        try:
            yield CoreFormat.parse(name)
        except PlanError:  # an edgec without it has nothing to simulate
            continue


def dense_peer(family: str, fmt: CoreFormat, target: Target, *, feedback: bool) -> Peer:
    """Every layer at one format; a layer narrower than the block takes the widest block that fits.

    feedback: use the second moment (GPTQ); without it, rounding to nearest.
    """

    def make(weight: NDArray[Any], moment: SecondMoment | None) -> Replacement:
        own = fitting(fmt, int(weight.shape[1]))
        factors = fit(weight, Spec("dense"), own, moment=moment if feedback else None, quantizer=gptq.quantize)
        return Replacement(factors, factors.stored_bytes, str(own), simulated=is_simulated(own))

    return Peer(family, f"{family} {fmt}", make, "none" if is_simulated(fmt) else target.name)


def fitting(fmt: CoreFormat, width: int) -> CoreFormat:
    """The format with the widest block that is not wider than the layer: longer ones would store padding."""
    blocks = [b for b in FAST_BLOCKS if b <= min(fmt.block, width)]
    return replace(fmt, block=blocks[-1] if blocks else FAST_BLOCKS[0])


def is_simulated(fmt: CoreFormat) -> bool:
    return bool(getattr(fmt, "simulated", False))


def sized_peers(
    family: str,
    bits: Sequence[float],
    target: Target,
    structure: Callable[[int, int], tuple[Callable[[int], Spec], int]],
    *,
    whitened: bool,
) -> list[Peer]:
    """One int8-cored peer per budget. structure: (out, in) → (rank → Spec, largest rank).

    Blocks of 32, or of 16 where those allow a higher rank: a short bond pads its last block.
    """
    formats = [CoreFormat.parse(name) for name in ("int8-b32", "int8-b16")]

    def sized(budget: float) -> Peer:
        def make(weight: NDArray[Any], moment: SecondMoment | None) -> Replacement:
            shape = (int(weight.shape[0]), int(weight.shape[1]))
            spec_of, top = structure(*shape)
            ranks = [largest_rank(spec_of, top, shape, fmt, budget) for fmt in formats]
            rank = max(ranks)
            fmt = formats[ranks.index(rank)]
            factors = fit(weight, spec_of(rank), fmt, moment=moment if whitened else None, quantizer=gptq.quantize)
            return Replacement(factors, factors.stored_bytes, f"χ={rank} {fmt}")

        return Peer(family, f"{family} + int8 at {budget:g}", make, target.name, bits=budget, factored=True)

    return [sized(budget) for budget in bits]


def largest_rank(
    spec_of: Callable[[int], Spec], top: int, shape: tuple[int, int], fmt: CoreFormat, bits: float
) -> int:
    """The largest rank 1 … top whose cores take at most `bits` per weight, or 1. Bytes never shrink as it grows."""
    room = bits * shape[0] * shape[1] / 8
    low, high = 1, top
    while low < high:
        middle = (low + high + 1) // 2
        if stored_bytes(spec_of(middle), shape, "linear", fmt) <= room:
            low = middle
        else:
            high = middle - 1
    return low
