"""Rounding to nearest: what every runtime's own quantizer does, and needs no text for."""

from __future__ import annotations

from collections.abc import Sequence

from edgec.peers import Peer
from edgec.peers._cores import dense_formats, dense_peer
from edgec.records import Target

PLUGIN = True
FAMILY = "RTN"


def peers(target: Target, bits: Sequence[float]) -> list[Peer]:
    """One per format that the target executes."""
    return [dense_peer(FAMILY, fmt, target, feedback=False) for fmt in dense_formats(target)]
