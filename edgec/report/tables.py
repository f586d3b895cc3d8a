"""The same rows for a terminal (rich, at most 100 columns), for programs (JSON) and for documents (Markdown)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from edgec.errors import BenchError
from edgec.records import Measurement, Plan, as_dict
from edgec.report import text

WIDTH = 100
"""Columns that a terminal table may take."""

JSON_VERSION = 2
"""1: low and high were quartiles."""


def measurement_table(measurements: Sequence[Measurement], title: str = "") -> Table:
    """One row per contestant: size, quality, the metrics that were measured, medians with ± half their spread."""
    metrics = [metric for metric in text.shown_metrics(measurements) if metric.in_terminal]
    table = _table(title)
    table.add_column("contestant", overflow="fold", min_width=10, max_width=24)
    table.add_column("size", justify="right", no_wrap=True)
    with_quality = any(row.quality for row in measurements)
    if with_quality:
        table.add_column("quality", overflow="fold", max_width=22)
    for metric in metrics:
        unit = f"\n{metric.unit}" if metric.unit else ""
        table.add_column(metric.label.lower() + unit, justify="right", max_width=12)
    for row in measurements:
        cells = [Text(text.shorten(row.contestant, 48)), Text(text.size(row.artifact_bytes))]
        if with_quality:
            cells.append(Text("\n".join(f"{k} {v}" for k, v in text.quality_items(row.quality)) or text.MISSING))
        cells += [Text(_cell(row, metric)) for metric in metrics]
        table.add_row(*cells)
    notes = [f"{text.shorten(r.contestant, 30)}: {text.clean(n, 400)}" for r in measurements for n in r.notes]
    notes += [f"{text.shorten(r.contestant, 30)}: {line}" for r in measurements if (line := text.memory_line(r))]
    if measurements:
        notes.insert(0, text.conditions(measurements))
    table.caption = Text("\n".join(notes), style="dim")
    return table


def _cell(row: Measurement, metric: text.Metric) -> str:
    found = row.metrics.get(metric.key)
    if found is None:
        return text.MISSING
    shown = text.size(found.value) if metric.is_bytes else text.number(found.value * metric.scale)
    return shown if metric.is_bytes or found.n < 2 else f"{shown}\n±{text.spread_percent(found):.0f} %"


def plan_table(plan: Plan, title: str = "") -> Table:
    """One row per planned layer, and the totals below."""
    table = _table(title or f"plan for {text.clean(plan.target)}, budget {text.clean(plan.budget)}")
    table.add_column("layer", overflow="fold", max_width=38)
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("kind · ranks", overflow="fold", max_width=20)
    table.add_column("cores", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    for choice in plan.choices:
        table.add_row(
            Text(text.shorten(choice.layer, 76)),
            Text(f"{choice.shape[0]}x{choice.shape[1]}"),
            Text(text.clean(choice.spec, 60)),
            Text(text.clean(choice.format, 16)),
            Text(text.size(choice.bytes)),
            Text(text.MISSING if choice.error is None else f"{choice.error:.3f}"),
        )
    total = f"total {text.size(plan.bytes)} ({text.size(plan.other_bytes)} beside the planned layers), "
    notes = [total + f"{plan.linear_bpw():.2f} linear bpw", *(text.clean(n, 400) for n in plan.notes)]
    table.caption = Text("\n".join(notes), style="dim")
    return table


def _table(title: str) -> Table:
    return Table(
        title=Text(text.clean(title)) if title else None,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        width=None,
        caption_justify="left",
        title_justify="left",
    )


def to_json(
    measurements: Sequence[Measurement], *, machine: Mapping[str, str] | None = None, commands: Sequence[str] = ()
) -> str:
    """Everything, unrounded: {"version", "machine", "commands", "measurements"}. Raises BenchError for NaN or Inf."""
    record: dict[str, Any] = {
        "version": JSON_VERSION,
        "machine": dict(machine or {}),
        "commands": list(commands),
        "measurements": [as_dict(row) for row in measurements],
    }
    try:
        return json.dumps(record, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise BenchError("a measurement holds NaN or infinity, which is no result; measure again") from error


def to_markdown(measurements: Sequence[Measurement]) -> str:
    """One table per task, with its conditions and notes below it."""
    parts = []
    for rows in text.by_task(measurements).values():
        metrics = text.shown_metrics(rows)
        header = ["contestant", "size", "quality", *(f"{m.label}{f' ({m.unit})' if m.unit else ''}" for m in metrics)]
        extra = any(row.kv_cache_bytes or row.roofline for row in rows)
        header += ["Limit ÷ decode", "KV cache"] if extra else []
        lines = [_markdown_row(header), "|" + " --- |" * len(header)]
        for row in rows:
            quality = "; ".join(f"{k} {v}" for k, v in text.quality_items(row.quality)) or text.MISSING
            cells = [row.contestant, text.size(row.artifact_bytes), quality]
            cells += [_cell(row, m).replace("\n", " ") for m in metrics]
            if extra:
                pairs = (text.memory_limit(row), text.kv_cache(row))
                cells += [f"{value} ({detail})" if detail else value for value, detail in pairs]
            lines.append(_markdown_row(cells))
        lines += ["", _markdown(text.conditions(rows)), ""]
        lines += [f"- {_markdown(r.contestant)}: {_markdown(n)}" for r in rows for n in r.notes]
        parts.append("\n".join(lines).rstrip() + "\n")
    return "\n".join(parts)


CSV_COLUMNS = ("contestant", "device", "threads", "metric", "unit", "median", "low", "high", "n")
"""low and high bound the true median (Spread); they and n are empty for what is counted or computed."""


def to_csv(measurements: Sequence[Measurement]) -> str:
    """One line per contestant and figure, unrounded, for spreadsheets and plots."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in measurements:
        head = (_csv(row.contestant), _csv(row.device), row.threads)
        for name, found in row.metrics.items():
            writer.writerow((*head, _csv(name), _unit(name), found.value, found.low, found.high, found.n))
        for name, value in _counted(row).items():
            writer.writerow((*head, _csv(name), _unit(name), value, "", "", ""))
    return out.getvalue()


def _counted(row: Measurement) -> dict[str, float]:
    """Figures without a spread: sizes, quality, and what is computed from sizes and medians."""
    found: dict[str, float] = {"artifact_bytes": row.artifact_bytes}
    if row.kv_cache_bytes:
        found["kv_cache_bytes"] = row.kv_cache_bytes
    if row.roofline is not None:
        found |= {f"roofline_{key}": value for key, value in as_dict(row.roofline).items()}
    found |= {f"ceiling_{key}": value for key, value in row.ceilings.items()}
    return found | {f"quality_{key}": value for key, value in row.quality.items()}


def _unit(name: str) -> str:
    """By the name's ending, which is where this project puts units."""
    endings = {"tok_s": "tok/s", "items_s": "sentences/s", "bytes_s": "B/s", "op_s": "op/s", "bytes": "B", "ms": "ms"}
    endings |= {"joules_token": "J/token", "joules_item": "J/sentence", "one_thread": "B/s", "_s": "s"}
    endings |= {"rss_growth_bytes": "B/1000 tokens"}
    longest = max((e for e in endings if name.endswith(e)), key=len, default="")
    return endings.get(longest, "")


def _csv(value: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    shown = text.clean(value, 400)
    return f"'{shown}" if shown[:1] in ("=", "+", "-", "@") else shown


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_markdown(cell) for cell in cells) + " |"


def _markdown(value: str) -> str:
    """Text that Markdown and the HTML inside it leave alone."""
    escaped = text.clean(value, 400).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join("\\" + c if c in "\\`*_[]|#!" else c for c in escaped)
