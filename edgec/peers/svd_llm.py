"""SVD-LLM (Wang et al. 2024, arXiv 2403.07378): truncation-aware whitening, then SVD; int8 cores."""

from __future__ import annotations

from collections.abc import Sequence

from edgec.peers import Peer
from edgec.peers._cores import sized_peers
from edgec.peers.svd import low_rank
from edgec.records import Target

PLUGIN = True
FAMILY = "SVD-LLM"


def peers(target: Target, bits: Sequence[float]) -> list[Peer]:
    """One per budget, at the rank that fits."""
    return sized_peers(FAMILY, bits, target, low_rank, whitened=True)
