"""GPTQ (Frantar et al. 2023, arXiv 2210.17323) on the dense weights, at every format and at 3 bits as a simulation."""

from __future__ import annotations

from collections.abc import Sequence

from edgec.peers import Peer
from edgec.peers._cores import dense_formats, dense_peer, simulated_formats
from edgec.records import Target

PLUGIN = True
FAMILY = "GPTQ"


def peers(target: Target, bits: Sequence[float]) -> list[Peer]:
    """One per format that the target executes; then those that nothing executes, labelled so."""
    formats = (*dense_formats(target), *simulated_formats())
    return [dense_peer(FAMILY, fmt, target, feedback=True) for fmt in formats]
