"""The TT-matrix layer of two cores in interleaved order (Novikov et al. 2015), by TT-SVD, int8 cores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from edgec.decompose.tensor_train import max_ranks
from edgec.peers import Peer
from edgec.peers._cores import sized_peers
from edgec.records import Spec, Target

PLUGIN = True
FAMILY = "TT"


def peers(target: Target, bits: Sequence[float]) -> list[Peer]:
    """One per budget, at the bond that fits."""
    return sized_peers(FAMILY, bits, target, interleaved, whitened=False)


def interleaved(out: int, in_: int) -> tuple[Callable[[int], Spec], int]:
    """χ → Spec with modes (o₁, i₁), (o₂, i₂), and the largest χ of their cut."""
    modes = tuple(zip(_halves(out), _halves(in_), strict=True))
    return (lambda rank: Spec("tensor_train", (rank,), modes)), max_ranks(modes)[0]


def _halves(n: int) -> tuple[int, int]:
    """n = a·b as balanced as it factors, b a multiple of 32 where it can be, so that int8 blocks hold no padding."""
    for multiple in (32, 1):
        fits = [a for a in range(1, math.isqrt(n) + 1) if n % a == 0 and (n // a) % multiple == 0]
        if fits and (fits[-1] > 1 or multiple == 1):
            return fits[-1], n // fits[-1]
    raise AssertionError("1 divides every n")
