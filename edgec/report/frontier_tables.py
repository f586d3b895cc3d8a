"""A frontier as JSON, as Markdown, and as a terminal table of 100 columns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from edgec.checkpoint import read_json
from edgec.errors import CheckpointError
from edgec.records import as_dict
from edgec.report import tables, text
from edgec.report.frontier_records import METRIC_LABELS, Frontier, Point, Verdict

_MOST_POINTS = 4096

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "sts_loss": ("spearman", "sts_loss", "cosine"),
    "cosine_loss": ("cosine", "cosine_loss"),
    "kl": ("kl", "perplexity", "perplexity_ratio", "top1"),
}
"""Figures shown, by metric."""

LABELS = {
    "spearman": "Spearman",
    "sts_loss": "loss",
    "cosine": "cosine",
    "cosine_loss": "1 − cosine",
    "kl": "KL, nats",
    "perplexity": "perplexity",
    "perplexity_ratio": "ratio",
    "top1": "top-1",
}


def ordered(points: Sequence[Point]) -> list[Point]:
    """Largest first; edgec's plan before a peer of its size."""
    return sorted(points, key=lambda p: (-p.linear_bytes, p.family != "edgec", p.name))


def to_json(found: Frontier, indent: int | None = 1) -> str:
    """Everything, unrounded; figures that are not finite become null."""
    return json.dumps(_finite(as_dict(found)), indent=indent, allow_nan=False) + "\n"


def read_frontier(path: Path) -> Frontier:
    """Inverse of `to_json`, for a file that nobody vouches for. Raises CheckpointError."""
    body = read_json(path)
    try:
        points = tuple(_point(entry) for entry in body["points"])
        if body["metric"] not in METRIC_LABELS or not 0 < len(points) <= _MOST_POINTS:
            raise ValueError(f"{len(points)} points of {body['metric']!r}")
        texts = (str(body[key]) for key in ("model", "target", "metric", "calibration", "evaluated_on", "heal"))
        dense = {str(key): float(value) for key, value in body["dense"].items() if value is not None}
        verdicts = tuple(Verdict(**entry) for entry in body["verdicts"])
        skipped = tuple(map(str, body["skipped"]))
        model, target, metric, calibration, evaluated_on, heal = texts
        return Frontier(
            model,
            target,
            metric,
            calibration,
            evaluated_on,
            heal,
            float(body["slack"]),
            dense,
            points,
            verdicts,
            skipped,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not what `edgec frontier` writes as frontier.json ({error!r})") from error


def _point(entry: Mapping[str, Any]) -> Point:
    figures = {str(key): float(value) for key, value in entry["figures"].items() if value is not None}
    bpw = float(entry["linear_bpw"])
    if not 0 < bpw < 1024:
        raise ValueError(f"{bpw} bits per weight")
    return Point(**{**entry, "linear_bpw": bpw, "linear_bytes": int(entry["linear_bytes"]), "figures": figures})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_markdown(found: Frontier) -> str:
    """Verdicts, every contestant, conditions, and what was skipped."""
    head, rows = verdict_rows(found)
    lines = [f"# Frontier of {_plain(found.model)} for {_plain(found.target)}", "", _table(head, rows)]
    head, rows = point_rows(found)
    lines += ["", _table(head, rows), "", *(f"{_plain(line)}  " for line in conditions(found))]
    if found.skipped:
        lines += ["", "Not run:", "", *(f"- {_plain(note)}" for note in found.skipped)]
    return "\n".join(lines) + "\n"


def terminal_tables(found: Frontier) -> list[Table]:
    """For `console`: the verdicts, then every contestant."""
    shown = []
    for title, (head, rows) in (
        (f"{found.model} for {found.target}: edgec against the best peer of its size", verdict_rows(found)),
        ("every contestant, largest first", point_rows(found)),
    ):
        table = tables._table(title)
        for number, name in enumerate(head):
            wide = name in ("contestant", "plan", "best peer", "layers")
            table.add_column(name, overflow="fold", justify="left" if wide else "right", max_width=22 if wide else None)
            assert number < len(head)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        shown.append(table)
    shown[-1].caption = Text("\n".join([*conditions(found), *(f"not run: {note}" for note in found.skipped)]), "dim")
    return shown


def verdict_rows(found: Frontier) -> tuple[list[str], list[list[str]]]:
    """Header and rows; the difference is plan − peer, so that negative is better."""
    head = ["budget", "plan", "bpw", "best peer", "bpw", "difference", "95 % interval", "verdict"]
    return head, [_verdict(verdict) for verdict in found.verdicts]


def _verdict(verdict: Verdict) -> list[str]:
    interval = text.MISSING
    if verdict.low is not None and verdict.high is not None:
        interval = f"{_signed(verdict.low)} … {_signed(verdict.high)}"
    return [
        f"{verdict.budget:g}",
        verdict.plan,
        f"{verdict.plan_bpw:.2f}",
        verdict.rival or text.MISSING,
        text.MISSING if verdict.rival_bpw is None else f"{verdict.rival_bpw:.2f}",
        text.MISSING if verdict.difference is None else _signed(verdict.difference),
        interval,
        verdict.verdict,
    ]


def point_rows(found: Frontier) -> tuple[list[str], list[list[str]]]:
    columns = COLUMNS[found.metric]
    head = ["contestant", "bpw", *(LABELS[c] for c in columns), "layers", "runs on"]
    rows = []
    for point in ordered(found.points):
        cells = [figure(point.figures, column) for column in columns]
        runs_on = "nothing: simulated" if point.simulated else point.runtime
        rows.append([point.name, f"{point.linear_bpw:.3f}", *cells, point.form, runs_on])
    return head, rows


def figure(figures: Mapping[str, float], name: str) -> str:
    """With its interval, where there is one and it is what contestants are compared by."""
    value = figures.get(name, math.nan)
    low, high = figures.get(f"{name}_low", math.nan), figures.get(f"{name}_high", math.nan)
    show: Callable[[float], str] = _signed if name == "sts_loss" else _digits
    if name == "perplexity" or not (math.isfinite(low) and math.isfinite(high)):
        return show(value)
    return f"{show(value)} [{show(low)} {show(high)}]"


def conditions(found: Frontier) -> list[str]:
    dense = ", ".join(f"{LABELS.get(name, name)} {_digits(value)}" for name, value in found.dense.items())
    return [
        f"Compared by {METRIC_LABELS[found.metric]}, on {found.evaluated_on}. Calibrated on {found.calibration}.",
        "Block linears only; embeddings and head at int8 for all; activations in floats, whatever a runtime makes of "
        f"them. Healing: {found.heal}."
        + (f" Dense: {dense}." if dense else ""),
        f"A peer is of a plan's size when it takes at most {found.slack:.0%} more bytes, and something executes it. "
        "Intervals: paired bootstrap, 95 %.",
    ]


def _signed(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else text.MISSING


def _digits(value: float) -> str:
    if not math.isfinite(value):
        return text.MISSING
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [tables._markdown_row(head), "|" + " --- |" * len(head), *(tables._markdown_row(row) for row in rows)]
    return "\n".join(lines)


def _plain(value: str) -> str:
    return tables._markdown(value)
