"""What healing was asked for, as people type it: `auto`, `off`, `10min`, `90s`, `300steps`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from edgec.errors import UsageError

METHODS = ("full", "lora")
AUTO_SECONDS = 300.0
"""What `auto` spends at most [seconds]: about as long as everything else that an export of a small model does."""

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*(min|s|steps)")


@dataclass(frozen=True)
class HealSettings:
    """mode: "off", "auto", "seconds" or "steps"; amount: how many of them (0 for off).

    method: "full" trains every number of every core; "lora" a low-rank change of each quantised core (Hu et al. 2021,
    arXiv 2106.09685), which learns less and forgets less. device: "cpu", "cuda" or any that torch knows. A run
    limited by time lowers its rate and ends by the clock; `Nsteps` gives the same bytes twice.
    """

    mode: str = "off"
    amount: float = 0.0
    method: str = "full"
    device: str = "cpu"
    seed: int = 0
    text: str = "off"

    def __str__(self) -> str:
        return self.text

    def shortened(self, share: float) -> HealSettings:
        """The same for a share of the time, or of the steps."""
        amount = max(1.0, float(round(self.amount * share))) if self.mode == "steps" else self.amount * share
        return replace(self, amount=amount)


def parse_heal(text: str, *, method: str = "full", device: str = "cpu", seed: int = 0) -> HealSettings:
    """Raises UsageError saying what may be typed."""
    typed = text.strip().lower()
    if method not in METHODS:
        raise UsageError(f"healing method {method!r}: expected {' or '.join(METHODS)}")
    if typed in ("off", "auto"):
        amount = AUTO_SECONDS if typed == "auto" else 0.0
        return HealSettings(typed, amount, method, device, seed, typed)
    match = _AMOUNT.fullmatch(typed)
    value = float(match[1]) if match else 0.0
    if not match or not 0 < value < math.inf or (match[2] == "steps" and value != int(value)):
        raise UsageError(f"--heal {text}: expected auto, off, a time (10min, 90s) or a number of steps (300steps)")
    if match[2] == "steps":
        return HealSettings("steps", value, method, device, seed, typed)
    return HealSettings("seconds", value * (60 if match[2] == "min" else 1), method, device, seed, typed)
