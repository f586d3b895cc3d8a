"""One self-contained HTML file: plots inside, nothing loaded from anywhere, readable on a phone and on a wide screen.

The template is a file beside this one, rendered with escaping on for everything; the only markup that passes through
is the SVG that `plots` makes. A content security policy in the page forbids what could still be loaded.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgec._version import __version__
from edgec.outputs import written_file
from edgec.records import Measurement, Plan, Spread
from edgec.report import curves, frontier_page, plots, text
from edgec.report.frontier_records import Frontier

Cell = str | float | int | None


def write_report(
    path: Path,
    *,
    title: str,
    measurements: Sequence[Measurement],
    plan: Plan | None = None,
    profile_entropies: Mapping[str, float] | None = None,
    quality: Sequence[Mapping[str, Cell]] = (),
    machine: Mapping[str, str] | None = None,
    commands: Sequence[str] = (),
    subject: str | None = None,
    reference: str | None = None,
    not_measured: Sequence[str] = (),
    healing: Sequence[tuple[float, int, float]] = (),
    frontier: Frontier | None = None,
) -> Path:
    """Writes the report to `path` (replacing it, whole or not at all) and returns it.

    profile_entropies: layer name → entanglement entropy [nats]. quality: rows of a table, columns in order of
    appearance. subject: the contestant to highlight (default: the first); reference: the one that it is compared
    with in the headline (default: none). not_measured: lines added to what the report finds missing itself.
    healing: (seconds, step, held-out divergence) of the subject's healing. frontier: of `edgec frontier`, as it is.
    Raises OutputError.
    """
    subject = subject or (measurements[0].contestant if measurements else "")
    context = {
        "title": text.clean(title),
        "version": __version__,
        "tiles": _tiles(measurements, subject, reference),
        "groups": [_group(task, rows, subject) for task, rows in text.by_task(measurements).items()],
        "plan": _plan(plan, profile_entropies) if plan else None,
        "curves": [
            made for made in (curves.healing(healing), frontier_page.plot(frontier) if frontier else None) if made
        ],
        "quality": _quality_table(quality),
        "machine": {text.clean(k): text.clean(v, 400) for k, v in (machine or _this_machine()).items()},
        "commands": [text.clean(c, 4000) for c in commands],
        "not_measured": [text.clean(n, 600) for n in (*not_measured, *_missing(measurements, plan))],
    }
    with written_file(path) as temporary:
        temporary.write_text(_render(context), encoding="utf-8")
    return path


def _render(context: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(**context)


def _tiles(rows: Sequence[Measurement], subject: str, reference: str | None) -> list[dict[str, str]]:
    """The headline: the subject's size, speed and memory, and their ratio to the reference of the same task."""
    mine = next((r for r in rows if r.contestant == subject), None)
    if mine is None:
        return []
    other = next((r for r in rows if r.contestant == reference and r.task == mine.task), None)
    tiles = [
        _tile("Size", text.size(mine.artifact_bytes), mine.artifact_bytes, other.artifact_bytes if other else None)
    ]
    for metric in text.shown_metrics([mine]):
        if metric.key in ("item_ms", "ttft_ms", "load_s"):
            continue
        theirs = other.metrics.get(metric.key) if other else None
        value = mine.metrics[metric.key].value
        tiles.append(_tile(metric.label, text.amount(metric, value), value, theirs.value if theirs else None))
    for tile in tiles:
        tile["against"] = text.shorten(other.contestant, 30) if other and tile["ratio"] else ""
    return tiles


def _tile(label: str, shown: str, value: float, other: float | None) -> dict[str, str]:
    return {"label": label, "value": shown, "ratio": f"{text.number(value / other)} ×" if other else ""}


def _group(task: str, rows: Sequence[Measurement], subject: str) -> dict[str, Any]:
    metrics = text.shown_metrics(rows)
    limits = any(row.roofline or row.kv_cache_bytes for row in rows)
    return {
        "task": {"encoder": "Sentence encoder", "causal-lm": "Causal language model"}.get(task, text.clean(task)),
        "conditions": text.conditions(rows),
        "columns": [f"{m.label}{f', {m.unit}' if m.unit else ''}" for m in metrics] + (list(_LIMITS) if limits else []),
        "rows": [_row(row, metrics, subject, limits=limits) for row in rows],
        "with_limits": limits,
        "plots": [*filter(None, [curves.size_against_quality(rows, subject)]), *plots.bars(rows, subject)],
        "notes": [(text.clean(row.contestant), text.clean(n, 600)) for row in rows for n in row.notes],
        "with_quality": any(row.quality for row in rows),
    }


_LIMITS = ("Limit ÷ decode", "KV cache")


def _row(row: Measurement, metrics: Sequence[text.Metric], subject: str, *, limits: bool) -> dict[str, Any]:
    cells = [_cell(metric, row.metrics.get(metric.key)) for metric in metrics]
    if limits:
        cells += [text.memory_limit(row), text.kv_cache(row)]
    return {
        "name": text.clean(row.contestant),
        "subject": row.contestant == subject,
        "failed": not row.metrics,
        "size": text.size(row.artifact_bytes),
        "quality": text.quality_items(row.quality),
        "cells": cells,
    }


def _cell(metric: text.Metric, found: Spread | None) -> tuple[str, str]:
    """(median, its interval) as text."""
    if found is None:
        return text.MISSING, ""
    shown = text.size if metric.is_bytes else lambda value: text.number(value * metric.scale)
    low, high = shown(found.low), shown(found.high)
    if low.rpartition(" ")[2] == high.rpartition(" ")[2]:
        low = low.rpartition(" ")[0] or low  # 89.2 … 92.8 MB: the unit once
    return shown(found.value), f"{low} … {high}" if found.n > 1 else ""


def _plan(plan: Plan, entropies: Mapping[str, float] | None) -> dict[str, Any]:
    entropies = entropies or {}
    kinds = Counter((c.role, c.spec.kind, c.format) for c in plan.choices)
    return {
        "facts": {
            "target": text.clean(plan.target),
            "budget": text.clean(plan.budget),
            "predicted size": text.size(plan.bytes),
            "linear bits per weight": f"{plan.linear_bpw():.2f}",
            "beside the planned layers": text.size(plan.other_bytes),
            "checkpoint": text.shorten(plan.fingerprint, 24),
        },
        "kinds": [(*map(text.clean, key), count) for key, count in sorted(kinds.items())],
        "notes": [text.clean(n, 600) for n in plan.notes],
        "strips": plots.layer_strips(plan, entropies),
        "with_entropy": bool(entropies),
        "layers": [
            {
                "name": text.clean(c.layer),
                "shape": f"{c.shape[0]} × {c.shape[1]}",
                "spec": text.clean(c.spec),
                "format": text.clean(c.format),
                "size": text.size(c.bytes),
                "error": text.MISSING if c.error is None else text.number(c.error),
                "entropy": text.number(entropies[c.layer]) if c.layer in entropies else text.MISSING,
            }
            for c in plan.choices
        ],
    }


def _quality_table(rows: Sequence[Mapping[str, Cell]]) -> dict[str, Any] | None:
    if not rows:
        return None
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = [[_quality_cell(row.get(column)) for column in columns] for row in rows]
    return {"columns": [text.clean(c) for c in columns], "rows": shown}


def _quality_cell(value: Cell) -> str:
    if value is None:
        return text.MISSING
    return text.number(value) if isinstance(value, float) else text.clean(value)


def _this_machine() -> dict[str, str]:
    return {"system": f"{platform.system()} ({platform.machine()})", "python": platform.python_version()}


def _missing(rows: Sequence[Measurement], plan: Plan | None) -> list[str]:
    """What a reader might look for and not find; a report that is silent about it would suggest that all is well."""
    result = []
    if not rows:
        result.append("Nothing was timed in this run: no speed, no memory.")
    without = [text.clean(r.contestant, 60) for r in rows if r.metrics and not r.quality]
    if without:
        result.append(f"Quality of {', '.join(without)}.")
    failed = [text.clean(r.contestant, 60) for r in rows if not r.metrics]
    if failed:
        result.append(f"Speed and memory of {', '.join(failed)}: every attempt failed (see the notes).")
    if rows:
        result.append("Devices other than the one named above, GPUs too; temperature and throttling over long runs.")
        result += _no_energy(rows)
        result.append("Loading from a cold disk: after the first round the files are in the page cache.")
    if plan and all(c.error is None for c in plan.choices):
        result.append("The functional error of each layer: the plan was made without activations.")
    return result


def _no_energy(rows: Sequence[Measurement]) -> list[str]:
    """Why there are no joules, in the words of the machine that was asked."""
    if any(name.startswith("joules_") for row in rows for name in row.metrics):
        return []
    told = next((str(row.settings["energy"]) for row in rows if "energy" in row.settings), "the device was not asked")
    return [f"Energy: {text.clean(told, 80)}."]
