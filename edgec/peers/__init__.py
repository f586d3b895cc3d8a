"""What else a user could do with the same weights and the same calibration text: one method per file.

A frontier means something only beside its rivals, so they run in the same process, on the same layers and second
moments, and are measured by the same code. A peer is uniform, as people apply it: one format or one parameter ratio for
every block linear. Calling the original tools (llama-quantize, SVD-LLM's scripts) was turned down: each wants its own
checkpoint, its own text and its own evaluation, and differences between those drown differences between methods.

A file is a plugin when it sets `PLUGIN = True` and defines

    FAMILY: str                                     what a report calls the method
    peers(target, bits) -> list[Peer]               its contestants; RuntimeUnavailableError when it needs what is
                                                    not installed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from numpy.typing import NDArray

from edgec import plugins
from edgec.errors import UsageError
from edgec.fit import Factors
from edgec.moments import SecondMoment
from edgec.records import Target


@dataclass(frozen=True, eq=False)
class Replacement:
    """What a peer makes of one layer.

    factors: what it computes with; for a format that edgec does not store, one dense float core holding the values
    that the peer's codes stand for. bytes: true stored size. form: the format that was really used, for example
    "int4-b32", "r=96 int8-b32" or "Q3_K→Q4_0" where the peer falls back. simulated: no runtime executes it. healable:
    the factors are the peer's own cores, so that they can be trained and stored again.
    """

    factors: Factors
    bytes: int
    form: str
    simulated: bool = False
    healable: bool = True


@dataclass(frozen=True, eq=False)
class Peer:
    """One contestant. replace: (weight [out, in], second moment of its input or None) → Replacement.

    bits: the budget that it was sized for [bits per weight], or None where its format decides. factored: low rank or a
    tensor train. runtime: what executes it.
    """

    family: str
    name: str
    replace: Callable[[NDArray[Any], SecondMoment | None], Replacement]
    runtime: str
    bits: float | None = None
    factored: bool = False


class Family(Protocol):
    """What a file in this folder defines at module level."""

    FAMILY: str

    def peers(self, target: Target, bits: Sequence[float]) -> Sequence[Peer]: ...


def families() -> tuple[str, ...]:
    """Names of all methods."""
    return plugins.names(__name__)


def get(name: str) -> Family:
    """The method called `name`; UsageError lists the known ones."""
    return cast(Family, plugins.load(__name__, name))


def chosen(text: str) -> tuple[str, ...]:
    """`--peers`: "all", "none", or names with commas between them. Raises UsageError."""
    if text in ("all", "none"):
        return families() if text == "all" else ()
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names or (unknown := sorted(set(names) - set(families()))):
        wrong = unknown[0] if names else text
        raise UsageError(f"--peers {wrong!r}: expected all, none, or some of {', '.join(families())}")
    return names
