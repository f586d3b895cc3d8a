"""The frontier as a picture: quality lost against bits per weight, edgec's line over the field of its peers.

The SVG is drawn like the other plots of a report (placeholder colours become CSS variables); alone in a file it
brings the variables along, so that it follows light and dark there too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgec.report import frontier_tables, plots, text
from edgec.report.frontier_records import AHEAD, BEHIND, METRIC_LABELS, Frontier, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH_IN, _HEIGHT_IN = 7.0, 5.2
_STYLES = {  # hues of Okabe and Ito (2008), told apart without colour by their markers too
    "RTN": ("#e69f00", "o"),
    "GPTQ": ("#d55e00", "s"),
    "llama.cpp": ("#56a4d8", "^"),
    "SVD-LLM": ("#cc79a7", "D"),
    "SVD": ("#9a8fd0", "v"),
    "TT": ("#8c8c8c", "P"),
}
_OTHER = ("#777777", "X")
_PALETTE = """:root { --paper: #fbfaf8; --card: #ffffff; --ink: #1d2129; --soft: #5d6573; --line: #dfe2e8;
  --accent: #0b7a75; --bar: #b9c2cf; --shade: rgba(20, 25, 35, .28); --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --card: #1c2027; --ink: #e7eaf0; --soft: #9aa3b2;
  --line: #333a45; --accent: #3fbfb4; --bar: #566072; --shade: rgba(0, 0, 0, .38); --bad: #ff8a80; } }"""


def plot(found: Frontier) -> plots.Plot:
    """Bits per weight along x (logarithmic), the metric along y: smaller and further left is better."""
    from matplotlib.figure import Figure

    shown = [p for p in found.points if math.isfinite(p.figures.get(found.metric, math.nan))]
    figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), dpi=72)
    axes = figure.add_axes((0.115, 0.115, 0.865, 0.735))
    families = [f for f in dict.fromkeys(p.family for p in shown) if f != "edgec"]
    for family in families:
        _field(axes, [p for p in shown if p.family == family], family, found.metric)
    for healed in (False, True):
        _line(axes, [p for p in shown if p.family == "edgec" and p.healed == healed], found.metric, healed)
    _scales(axes, shown, found.metric)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.01), ncols=4, frameon=False, fontsize=11, labelcolor=plots.INK,
        handletextpad=0.3, columnspacing=1.1,
    )  # fmt: skip
    note = f"{METRIC_LABELS[found.metric]}; down and left is better; hollow: simulated, nothing executes it"
    return plots.Plot("Frontier", note, plots.svg(figure, f"frontier {found.model} {len(found.points)}"), wide=True)


def _field(axes: Axes, points: Sequence[Point], family: str, metric: str) -> None:
    colour, marker = _STYLES.get(family, _OTHER)
    groups: dict[tuple[bool, bool], list[Point]] = {}
    for point in points:
        groups.setdefault((point.simulated, point.healed), []).append(point)
    for number, ((simulated, healed), group) in enumerate(groups.items()):
        axes.scatter(
            [p.linear_bpw for p in group], [p.figures[metric] for p in group], s=58 if healed else 34, marker=marker,
            facecolors="none" if simulated else colour, edgecolors=plots.INK if healed else colour,
            linewidths=1.2, zorder=3, label=family if number == 0 else None,
        )  # fmt: skip


def _line(axes: Axes, points: Sequence[Point], metric: str, healed: bool) -> None:
    if not points:
        return
    ordered = sorted(points, key=lambda p: p.linear_bpw)
    x, y = [p.linear_bpw for p in ordered], [p.figures[metric] for p in ordered]
    low = [max(0.0, v - p.figures.get(f"{metric}_low", v)) for v, p in zip(y, ordered, strict=True)]
    high = [max(0.0, p.figures.get(f"{metric}_high", v) - v) for v, p in zip(y, ordered, strict=True)]
    axes.errorbar(
        x, y, yerr=[low, high], color=plots.ACCENT, linewidth=2.2, marker="o", markersize=7, elinewidth=1.2,
        linestyle="-" if healed or len({p.healed for p in points}) == 1 else "--", zorder=4,
        markerfacecolor=plots.ACCENT, label="edgec, healed" if healed else "edgec",
    )  # fmt: skip


def _scales(axes: Axes, points: Sequence[Point], metric: str) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    values = [p.figures[metric] for p in points]
    bits = [p.linear_bpw for p in points]
    axes.set_xscale("log")
    ticks = [t for t in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16) if not bits or min(bits) * 0.9 <= t <= max(bits) * 1.1]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{t:g}" for t in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    if values and min(values) > 0:
        axes.set_yscale("log")
    elif values:  # a loss of zero or less is within the noise of none: the axis is linear there
        axes.set_yscale("symlog", linthresh=_linear_below(values))
    axes.grid(True, color=plots.FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=plots.INK, labelsize=11, length=3)
    axes.tick_params(which="minor", length=0, labelleft=False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(plots.INK)
    axes.set_xlabel("bits per weight of the block linears", fontsize=11.5, color=plots.INK)
    axes.set_ylabel(METRIC_LABELS[metric], fontsize=11.5, color=plots.INK, labelpad=2)


def _linear_below(values: Sequence[float]) -> float:
    """Where a symmetric logarithmic axis turns linear: about the size of the noise around zero."""
    return max(1e-3, 2 * abs(min(0.0, *values)))


def standalone_svg(found: Frontier) -> str:
    """The plot as a file of its own."""
    start, end = plot(found).svg.split(">", 1)
    style = f"<style>{_PALETTE} svg {{ background: var(--paper); }}</style>"
    return f'<?xml version="1.0" encoding="utf-8"?>\n{start}>{style}{end}\n'


def page(found: Frontier) -> str:
    """One self-contained HTML file; nothing is loaded from anywhere."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    points = frontier_tables.ordered(found.points)
    return environment.get_template("frontier.html.j2").render(
        title=text.clean(f"Frontier of {found.model} for {found.target}"),
        palette=_PALETTE,
        plot=plot(found),
        verdicts=_cells(frontier_tables.verdict_rows(found)),
        marks=[{AHEAD: "good", BEHIND: "bad"}.get(v.verdict, "") for v in found.verdicts],
        points=_cells(frontier_tables.point_rows(found)),
        own=[p.family == "edgec" for p in points],
        conditions=[text.clean(line, 600) for line in frontier_tables.conditions(found)],
        skipped=[text.clean(note, 600) for note in found.skipped],
    )


def _cells(table: tuple[list[str], list[list[str]]]) -> tuple[list[str], list[list[str]]]:
    head, rows = table
    return head, [[text.clean(cell, 400) for cell in row] for row in rows]
