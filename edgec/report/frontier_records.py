"""What a frontier run found, as plain data that the tables, the plot and the JSON share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

AHEAD, NOISE, BEHIND, ALONE = "ahead", "within the noise", "behind", "no peer so small"


@dataclass(frozen=True)
class Point:
    """One contestant: one plan of edgec's, or one peer at one format or size.

    family: "edgec" or the peer's method. form: what the layers became, most frequent first. budget: the bits per weight
    that it was sized for, or None. linear_bpw: 8 × stored bytes ÷ parameters of the block linears; linear_bytes the
    bytes. runtime: what executes it. simulated: nothing does. healed: factors were trained afterwards.
    figures: name → value; `x_low` and `x_high` are the 95 % interval of x. The figure called as the frontier's `metric`
    is what contestants are compared by; smaller is better.
    """

    name: str
    family: str
    form: str
    budget: float | None
    linear_bpw: float
    linear_bytes: int
    runtime: str
    simulated: bool = False
    healed: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """edgec's plan at one budget against the best peer of its size: difference = plan − rival in the metric, so that
    negative is better, with its paired-bootstrap 95 % interval; verdict is AHEAD, NOISE or BEHIND.
    rival: None where no peer is so small; there is no difference then, and the verdict is ALONE.
    """

    budget: float
    plan: str
    plan_bpw: float
    rival: str | None
    rival_bpw: float | None
    difference: float | None
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True)
class Frontier:
    """One run. metric: "sts_loss", "cosine_loss" or "kl"; dense: the dense model's figures. evaluated_on: the
    text, with its size. slack: how much larger a rival may be, as a share. skipped: what was not run, with
    the reason.
    """

    model: str
    target: str
    metric: str
    calibration: str
    evaluated_on: str
    heal: str
    slack: float
    dense: Mapping[str, float]
    points: tuple[Point, ...]
    verdicts: tuple[Verdict, ...]
    skipped: tuple[str, ...] = ()
    version: int = 1


METRIC_LABELS = {
    "sts_loss": "loss in Spearman against dense",
    "cosine_loss": "1 − mean cosine to dense",
    "kl": "KL from dense, nats per token",
}
