"""Plain truncated SVD with int8 cores: low rank without looking at a single activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgec.peers import Peer
from edgec.peers._cores import sized_peers
from edgec.records import Spec, Target

PLUGIN = True
FAMILY = "SVD"


def peers(target: Target, bits: Sequence[float]) -> list[Peer]:
    """One per budget, at the rank that fits."""
    return sized_peers(FAMILY, bits, target, low_rank, whitened=False)


def low_rank(out: int, in_: int) -> tuple[Callable[[int], Spec], int]:
    """rank → Spec, and the rank above which a second factor saves nothing."""
    return (lambda rank: Spec("svd", (rank,))), min(out, in_)
