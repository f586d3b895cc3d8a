"""Small SVG plots that live inside the page: no files, no script, colours that follow light and dark.

Matplotlib draws with placeholder colours, which are then replaced by CSS variables; text stays text. Figures are made
narrow (360 px) and laid out in a grid, because a wide figure scaled down to a phone is unreadable.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgec.records import Measurement, Plan
from edgec.report import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH_IN, _DPI = 5.0, 72
WIDTH_PX = _WIDTH_IN * _DPI
INK, FAINT, ACCENT, OTHER, _RUNTIME = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {INK: "--ink", FAINT: "--line", ACCENT: "--accent", OTHER: "--bar", _RUNTIME: "--shade"}
_LABEL_CHARACTERS = 30
_CELL_TEXT_COLUMNS = 8
_Bar = tuple[str, float, float, float, float]  # name, median, its interval, shaded part
_IDS = r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|[xy]tick|(?:Path|Poly|Line)Collection)_\d+"'
_BLOCK = re.compile(r"(?:^|\.)(\d{1,4})(?:\.|$)")


@dataclass(frozen=True)
class Plot:
    """One figure: `title` and `note` are plain text, `svg` is markup made here. wide: drawn for two columns."""

    title: str
    note: str
    svg: str
    wide: bool = False


def bars(rows: Sequence[Measurement], subject: str) -> list[Plot]:
    """One horizontal bar plot for size and for each metric; whiskers are intervals, `subject` is highlighted."""
    plots = []
    sizes = [(r.contestant, float(r.artifact_bytes), 0.0, 0.0, 0.0) for r in rows if r.artifact_bytes]
    if sizes:
        plots.append(_bar_plot("Size", "model and external data; smaller is better", sizes, subject, text.size))
    for metric in text.shown_metrics(rows):
        bar_rows: list[_Bar] = []
        for row in rows:
            found = row.metrics.get(metric.key)
            if found is None or not math.isfinite(found.value + found.low + found.high):
                continue
            base = row.metrics.get("runtime_rss_bytes") if metric.key == "peak_rss_bytes" else None
            value, low, high = (v * metric.scale for v in (found.value, found.low, found.high))
            bar_rows.append((row.contestant, value, low, high, base.value if base else 0.0))
        direction = "higher is better" if metric.higher_is_better else "lower is better"
        note = f"{metric.unit}; {direction}" if metric.unit else direction
        if any(r[4] for r in bar_rows):
            note += "; the shaded part is the empty runtime"
        if bar_rows:
            shown = text.size if metric.is_bytes else text.number
            plots.append(_bar_plot(metric.label, note, bar_rows, subject, shown))
    return plots


def _bar_plot(title: str, note: str, rows: Sequence[_Bar], subject: str, shown: Callable[[float], str]) -> Plot:
    drawn, axes = figure(0.25 + 0.6 * len(rows))
    top = max(max(r[1], r[3]) for r in rows)
    for i, (name, value, low, high, shaded) in enumerate(rows):
        axes.barh(i, value, height=0.42, color=ACCENT if name == subject else OTHER)
        if shaded:
            axes.barh(i, min(shaded, value), height=0.42, color=_RUNTIME)
        if high > low:
            axes.plot([low, high], [i, i], color=INK, linewidth=1.1, solid_capstyle="butt")
        label = text.shorten(name, _LABEL_CHARACTERS)
        _say(axes, 0, i - 0.3, label, va="bottom", ha="left", fontsize=12.5, color=INK)
        _say(axes, max(value, high) + 0.02 * top, i, shown(value), va="center", ha="left", fontsize=12.5, color=INK)
    axes.set_xlim(0, top * 1.24)
    axes.set_ylim(len(rows) - 0.5, -0.75)
    axes.axis("off")
    return Plot(title, note, svg(drawn, f"bars {title} {rows}"))


def layer_strips(plan: Plan, entropies: Mapping[str, float] | None) -> list[Plot]:
    """Blocks along x, kinds of layer along y: bits per dense weight, bond dimension χ, functional error, entropy."""
    cells: dict[str, dict[tuple[str, int], tuple[float, str]]] = {"bits": {}, "rank": {}, "error": {}, "entropy": {}}
    for choice in plan.choices:
        place = place_of(choice.layer)
        if place is None:
            continue
        full = min(choice.shape)
        weights = choice.shape[0] * choice.shape[1]
        bits = 8 * choice.bytes / weights if weights else math.nan
        rank = max(choice.spec.ranks, default=0)
        cells["bits"][place] = (bits, f"{bits:.1f}")
        cells["rank"][place] = (rank / full, str(rank)) if rank and full else (math.nan, "")
        if choice.error is not None:
            cells["error"][place] = (choice.error, f"{choice.error:.2f}".lstrip("0") or "0")
    for layer, entropy in (entropies or {}).items():
        place = place_of(layer)
        if place is not None:
            cells["entropy"][place] = (entropy, f"{entropy:.1f}")
    titles = {
        "bits": ("Bits", "stored bits per dense weight of the layer"),
        "rank": ("Bond dimension χ", "the largest of the layer, as a share of its full rank; empty: not factored"),
        "error": ("Functional error", "relative, on calibration activations"),
        "entropy": ("Entanglement entropy", "nats, of the dense weight's spectrum"),
    }
    return [_strip(*titles[key], found) for key, found in cells.items() if any(map(_finite, found.values()))]


def place_of(layer: str) -> tuple[str, int] | None:
    """("self_attn.q_proj", 3) for "model.layers.3.self_attn.q_proj"; None for a layer outside the blocks."""
    match = _BLOCK.search(layer)
    if not match:
        return None
    return layer[match.end() :] or layer[: match.start()], int(match[1])


def _finite(cell: tuple[float, str]) -> bool:
    return math.isfinite(cell[0])


def _strip(title: str, note: str, cells: Mapping[tuple[str, int], tuple[float, str]]) -> Plot:
    import matplotlib as mpl
    from matplotlib.patches import Rectangle

    kinds = list(dict.fromkeys(kind for kind, _ in cells))[:64]
    blocks = sorted({block for _, block in cells})[:512]
    values = [v for v, _ in cells.values() if math.isfinite(v)]
    low, high = min(values), max(values)
    colours = mpl.colormaps["viridis"]
    drawn, axes = figure(0.42 + 0.34 * len(kinds))
    left = 0.5 * max(1, len(blocks))
    for y, kind in enumerate(kinds):
        _say(axes, -0.02 * len(blocks), y, text.shorten(kind, 18), va="center", ha="right", fontsize=11.5, color=INK)
        for x, block in enumerate(blocks):
            value, label = cells.get((kind, block), (math.nan, ""))
            if not math.isfinite(value):
                axes.add_patch(Rectangle((x, y - 0.44), 0.94, 0.88, fill=False, edgecolor=FAINT, linewidth=0.6))
                continue
            shade = 0.15 + 0.8 * ((value - low) / (high - low) if high > low else 0.5)
            axes.add_patch(Rectangle((x, y - 0.44), 0.94, 0.88, color=colours(shade), linewidth=0))
            if len(blocks) <= _CELL_TEXT_COLUMNS:
                ink = "black" if shade > 0.6 else "white"
                _say(axes, x + 0.47, y, label, va="center", ha="center", fontsize=11, color=ink)
    step = max(1, math.ceil(len(blocks) / 12))
    for x in range(0, len(blocks), step):
        _say(axes, x + 0.47, len(kinds) - 0.38, str(blocks[x]), va="top", ha="center", fontsize=11, color=INK)
    axes.set_xlim(-left, len(blocks))
    axes.set_ylim(len(kinds) + 0.1, -0.55)
    axes.axis("off")
    shown = f"{note}; from {text.number(low)} (dark) to {text.number(high)} (bright); blocks from left to right"
    return Plot(title, shown, svg(drawn, f"strip {title} {sorted(cells)}"))


def figure(height_in: float, place: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)) -> tuple[Figure, Axes]:
    """A figure of its own, 360 px wide, without pyplot's global state and without any window system. place: of its
    axes, (left, bottom, width, height) as shares.
    """
    from matplotlib.figure import Figure

    made = Figure(figsize=(_WIDTH_IN, height_in), dpi=_DPI)
    return made, made.add_axes(place)


def _say(axes: Axes, x: float, y: float, words: str, **style: Any) -> None:
    """Text that is only text: a name with a dollar sign in it is not a formula."""
    axes.text(x, y, words, parse_math=False, **style)


def svg(drawn: Figure, salt: str) -> str:
    """The figure as an <svg> element: ids unlike those of other figures, no date, placeholder colours replaced."""
    import matplotlib as mpl

    salt = hashlib.sha256(salt.encode()).hexdigest()[:12]
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": salt, "svg.id": f"p{salt}"}
    options |= {"font.family": ["sans-serif"], "font.sans-serif": ["DejaVu Sans"]}
    buffer = io.StringIO()
    with mpl.rc_context(options), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that DejaVu lacks is drawn by the browser's font, not by matplotlib
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    made = buffer.getvalue()
    made = made[made.index("<svg") :]
    made = re.sub(r"<metadata>.*?</metadata>", "", made, flags=re.DOTALL)
    # One id for every patch and text of every figure would be repeated in the page; nothing refers to them.
    made = re.sub(_IDS, "", made)
    made = re.sub(r'font: ([\d.]+px)[^;"]*', r"font-size: \1; font-family: inherit", made)
    for colour, variable in _VARIABLES.items():
        made = made.replace(colour, f"var({variable})")
    return made.strip()
