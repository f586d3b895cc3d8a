"""Numbers and names as text, the same in every format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgec.records import Measurement, Spread

MISSING = "–"
_MAX_NAME = 160
_WORTH_SAYING = 10_000_000
"""Resident pages of files from which a row mentions them [bytes]: below, they are the runtime's code."""


@dataclass(frozen=True)
class Metric:
    """How one metric is shown. scale: shown value = stored value × scale. higher_is_better: None for neither.

    in_terminal: has it a column in a terminal's 100, or only in documents?
    """

    key: str
    label: str
    unit: str
    scale: float = 1.0
    higher_is_better: bool | None = None
    is_bytes: bool = False
    in_terminal: bool = True


METRICS: tuple[Metric, ...] = (
    Metric("items_s", "Sentences/s", "", higher_is_better=True),
    Metric("item_ms", "One sentence", "ms", higher_is_better=False),
    Metric("decode_tok_s", "Decode", "tok/s", higher_is_better=True),
    Metric("prefill_tok_s", "Prefill", "tok/s", higher_is_better=True),
    Metric("ttft_ms", "First token", "ms", higher_is_better=False),
    Metric("peak_rss_bytes", "Peak RAM", "", higher_is_better=False, is_bytes=True),
    Metric("load_s", "Load", "ms", scale=1e3, higher_is_better=False),
    Metric("item_p95_ms", "One sentence, 95 % within", "ms", higher_is_better=False, in_terminal=False),
    Metric("step_p95_ms", "One token, 95 % within", "ms", higher_is_better=False, in_terminal=False),
    Metric("joules_token", "Energy", "J/token", higher_is_better=False),
    Metric("joules_item", "Energy", "J/sentence", higher_is_better=False),
)
"""Shown metrics, most wanted first; others (memory while loading, of the empty runtime) are in the JSON."""

QUALITY_LABELS = {
    "cosine": "cosine",
    "mean_cosine": "cosine",
    "pair_spearman": "pair similarities",
    "sts": "STS-B",
    "kl": "KL, nats",
    "perplexity": "perplexity",
    "perplexity_ratio": "perplexity ratio",
    "top1": "top-1",
}


def clean(text: object, limit: int = _MAX_NAME) -> str:
    """Printable text on one line: control characters, escape codes and direction overrides become �."""
    result = "".join(c if c.isprintable() else "�" for c in str(text))
    return result if len(result) <= limit else result[: limit - 1] + "…"


def shorten(text: object, limit: int) -> str:
    """The same, with the middle left out: the ends of layer and file names tell them apart."""
    result = clean(text)
    if len(result) <= limit:
        return result
    head = (limit - 1) // 2
    return result[:head] + "…" + result[len(result) - (limit - 1 - head) :]


def size(count: float) -> str:
    """Bytes in decimal units: 812 B, 9.8 MB, 1.24 GB."""
    if not math.isfinite(count):
        return MISSING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{count:.0f} B"


def number(value: float) -> str:
    """Three significant digits without an exponent: 0.0123, 1.25, 31.0, 1,188."""
    if not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude >= 2:
        return f"{value:,.0f}"
    return f"{value:.{min(8, 2 - magnitude)}f}"


def amount(metric: Metric, value: float) -> str:
    """A metric's value with its unit."""
    if metric.is_bytes:
        return size(value)
    text = number(value * metric.scale)
    return f"{text} {metric.unit}".strip()


def spread_percent(found: Spread) -> float:
    """Half the interval of the median, in percent of it."""
    return 50 * (found.high - found.low) / found.value if found.value else math.nan


def quality_items(quality: Mapping[str, float]) -> list[tuple[str, str]]:
    """(label, text) per quality figure; `x_low` and `x_high` are shown as the interval of `x`."""
    result = []
    for key, value in quality.items():
        base = key.removesuffix("_low").removesuffix("_high")
        if base != key and base in quality:
            continue
        text = _figure(value)
        if f"{key}_low" in quality and f"{key}_high" in quality:
            text += f" [{_figure(quality[f'{key}_low'])}…{_figure(quality[f'{key}_high'])}]"
        result.append((QUALITY_LABELS.get(key, clean(key.replace("_", " "), 40)), text))
    return result


def _figure(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else MISSING


def shown_metrics(measurements: Sequence[Measurement]) -> list[Metric]:
    """The metrics that at least one of these rows has."""
    return [m for m in METRICS if any(m.key in row.metrics for row in measurements)]


def memory_limit(row: Measurement) -> tuple[str, str]:
    """How far decoding is from the memory's limit, and what the limit is; dashes where it is not known."""
    found = row.roofline
    if found is None:
        return MISSING, ""
    read = size(found.weight_bytes + found.cache_bytes)
    return f"{found.distance:.2f} ×", f"{number(found.limit_tok_s)} tok/s, {read} a token"


def kv_cache(row: Measurement) -> tuple[str, str]:
    """What the cache holds after prompt and generation, and how much the process grew with its context."""
    growth = row.metrics.get("rss_growth_bytes")
    grown = f"{size(growth.value)} of RAM per 1000 tokens" if growth else ""
    return size(row.kv_cache_bytes) if row.kv_cache_bytes else MISSING, grown


def memory_line(row: Measurement) -> str:
    """One sentence about what decoding reads, what its cache takes and what it holds; "" where none is known."""
    parts = []
    if row.roofline is not None:
        found = row.roofline
        parts.append(
            f"a token reads {size(found.weight_bytes)} of weights and {size(found.cache_bytes)} of cache: at most "
            f"{number(found.limit_tok_s)} tok/s, {found.distance:.2f} × the measured"
        )
    if row.kv_cache_bytes:
        parts.append(f"KV cache {size(row.kv_cache_bytes)}")
    if growth := row.metrics.get("rss_growth_bytes"):
        parts.append(f"{size(growth.value)} of RAM per 1000 tokens more")
    peak, empty = row.metrics.get("peak_rss_bytes"), row.metrics.get("runtime_rss_bytes")
    if parts and peak and empty and row.artifact_bytes:
        mapped = row.metrics.get("mapped_rss_bytes")
        parts.append(f"beyond the empty runtime {(peak.value - empty.value) / row.artifact_bytes:.2f} × the file")
        if mapped and mapped.value >= _WORTH_SAYING:
            parts.append(f"at the end {size(mapped.value)} of the memory are pages of files")
    return "; ".join(parts)


def ceilings(rows: Sequence[Measurement]) -> str:
    """What the device itself gave in this run; "" where it was not asked."""
    told = next((row.ceilings for row in rows if row.ceilings), {})
    labels = {"read_bytes_s": "memory reads {} GB/s", "read_bytes_s_one_thread": "one thread {} GB/s"}
    labels["integer_op_s"] = "integer products {} GOP/s"
    return " · ".join(label.format(number(told[key] / 1e9)) for key, label in labels.items() if key in told)


def by_task(measurements: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    """Rows grouped by task, in order of appearance: tokens and sentences do not share a table."""
    groups: dict[str, list[Measurement]] = {}
    for row in measurements:
        groups.setdefault(row.task, []).append(row)
    return groups


def conditions(rows: Sequence[Measurement]) -> str:
    """What every row of a group was measured under; settings that differ between rows are left out."""
    first = rows[0]
    parts = [f"device {clean(first.device)}", f"{first.threads} thread{'' if first.threads == 1 else 's'}"]
    if any((r.device, r.threads) != (first.device, first.threads) for r in rows):
        parts = ["devices and threads as stated in each row"]
    if measured := ceilings(rows):
        parts.append(measured)
    for key, value in first.settings.items():
        if all(r.settings.get(key) == value for r in rows):
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            colon = ":" if key == "energy" else ""
            parts.append(f"{clean(key, 40).replace('_', ' ')}{colon} {clean(shown, 64)}")
    return " · ".join(parts)
