"""Plots with two axes: size against quality with the front of what nothing else beats, and a healing run's curve.

Drawn as the other plots of a report are (`plots`). The front is a staircase, not a line through its points: between two
of them nothing was made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edgec.records import Measurement
from edgec.report import plots, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT_IN = 3.9
_LOSSES: tuple[tuple[str, str, Callable[[float], float]], ...] = (
    ("kl", "KL from dense, nats per token", lambda value: value),
    ("spearman_loss", "loss in Spearman against dense", lambda value: value),
    ("cosine", "1 − mean cosine to dense", lambda value: 1 - value),
    ("perplexity_ratio", "perplexity ÷ dense", lambda value: value),
)
"""Quality figures as losses, most telling first: (key, label, to a loss)."""

_NOTHING = 1e-5
"""A loss from zero to this is rounding: a dense model beside itself [any of the losses above]."""
_LABELLED = 10
"""Most points with their names; more would cover one another."""
_LETTER = 6.8
"""About the width of a letter in a name [px]."""
_PLACES = [(side, up) for up in (0, 15, -15, 30, -30, 45, -45) for side in (1, -1)]
"""Where a name may stand: right or left of its point, and so many pixels above."""
_Point = tuple[str, float, float]  # name, bytes, loss


def size_against_quality(rows: Sequence[Measurement], subject: str) -> plots.Plot | None:
    """Down and left is better. None where fewer than two rows share a quality figure."""
    for key, label, loss in _LOSSES:
        points = [
            (row.contestant, float(row.artifact_bytes), loss(row.quality[key]))
            for row in rows
            if row.artifact_bytes > 0 and math.isfinite(row.quality.get(key, math.nan))
        ]
        if len(points) > 1:
            return _scatter(points, label, subject)
    return None


def front(points: Sequence[_Point]) -> list[_Point]:
    """Points that no other beats in both size and loss, smallest first; of equals the first."""
    best: list[_Point] = []
    for point in sorted(points, key=lambda p: (p[1], p[2])):
        if not best or point[2] < best[-1][2]:
            best.append(point)
    return best


def _at_the_bottom(points: Sequence[_Point]) -> tuple[list[_Point], bool]:
    """Losses that are rounding only, raised to a third of the least real one, and whether there were any: on a
    logarithmic axis 1e-12 would press all others together. Where a loss is negative the axis is linear anyway.
    """
    real = [loss for _, _, loss in points if loss > _NOTHING]
    if not real or len(real) == len(points) or any(loss < 0 for _, _, loss in points):
        return list(points), False
    floor = min(real) / 3
    return [(name, size, max(loss, floor)) for name, size, loss in points], True


def _scatter(points: Sequence[_Point], label: str, subject: str) -> plots.Plot:
    points, raised = _at_the_bottom(points)
    figure, axes = plots.figure(_HEIGHT_IN, (0.17, 0.15, 0.8, 0.8))
    line = front(points)
    if len(line) > 1:
        axes.step(
            [p[1] for p in line], [p[2] for p in line], where="post", color=plots.ACCENT, linewidth=1.2, linestyle=":"
        )
    for name, x, y in points:
        mine = name == subject
        axes.scatter(
            [x], [y], s=70 if mine else 44, color=plots.ACCENT if mine else plots.OTHER, edgecolors=plots.INK,
            linewidths=0.8, zorder=3,
        )  # fmt: skip
    _axes(axes, "size", label)
    _size_axis(axes, [p[1] for p in points])
    _loss_axis(axes, [p[2] for p in points])
    if len(points) <= _LABELLED:
        _names(axes, points)
    note = f"{label}; down and left is better; dotted: what nothing here beats in both"
    if raised:
        note += f"; what loses less than {_NOTHING:.5f} stands at the bottom"
    return plots.Plot("Size against quality", note, plots.svg(figure, f"scatter {label} {sorted(points)}"))


def healing(points: Sequence[tuple[float, int, float]]) -> plots.Plot | None:
    """points: (seconds, step, held-out divergence). A point where the run had diverged to no number is left out."""
    shown = [(seconds, value) for seconds, _, value in points if math.isfinite(seconds) and math.isfinite(value)]
    if len(shown) < 2:
        return None
    figure, axes = plots.figure(_HEIGHT_IN, (0.17, 0.15, 0.8, 0.8))
    x, y = [s for s, _ in shown], [v for _, v in shown]
    axes.plot(x, y, color=plots.ACCENT, linewidth=2, marker="o", markersize=5)
    best = min(range(len(y)), key=y.__getitem__)
    axes.scatter([x[best]], [y[best]], s=110, facecolors="none", edgecolors=plots.INK, linewidths=1.4, zorder=4)
    _axes(axes, "seconds", "divergence from dense")
    _loss_axis(axes, y)
    axes.set_xlim(-0.03 * max(x), 1.05 * max(x) or 1.0)
    note = (
        f"held-out divergence from the dense model as the run saw it, {text.number(y[0])} → {text.number(y[best])}; "
        "ringed: the state that was kept"
    )
    return plots.Plot("Healing", note, plots.svg(figure, f"healing {shown}"))


def _axes(axes: Axes, x: str, y: str) -> None:
    axes.grid(True, color=plots.FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=plots.INK, labelsize=11, length=3)
    axes.tick_params(which="minor", length=0, labelleft=False, labelbottom=False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(plots.INK)
    axes.set_xlabel(x, fontsize=11.5, color=plots.INK)
    axes.set_ylabel(y, fontsize=11.5, color=plots.INK, labelpad=2)


def _size_axis(axes: Axes, values: Sequence[float]) -> None:
    """Decimal sizes; logarithmic where the largest is several times the smallest."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    if high > 4 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.25, high * 1.5)
        axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(max(0.0, low - 0.15 * (high - low or low)), high + 0.3 * (high - low or high))
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _round_size(value)))


def _round_size(value: float) -> str:
    """ "20 MB" for 20.0 MB: an axis needs no third digit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g} B"


def _loss_axis(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where losses differ by much; a loss at or below zero is within the noise and needs a linear axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    if low > 0 and high > 8 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.6, high * 1.6)
        axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5) if high < 100 * low else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        room = 0.15 * ((high - low) or abs(high) or 1.0)
        axes.set_ylim(low - room, high + room)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _names(axes: Axes, points: Sequence[_Point]) -> None:
    """Beside each point: the first of some places where neither the edge nor another point or name is in the way."""
    to_pixels = axes.transData.transform
    edge = axes.get_window_extent()
    dots = [tuple(map(float, to_pixels(p[1:]))) for p in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in dots]
    for (name, size, loss), (x, y) in zip(points, dots, strict=True):
        shown = text.shorten(name, 24)
        width = _LETTER * len(shown)
        for side, up in _PLACES:
            left = x + 9 if side > 0 else x - 9 - width
            box = (left, y + up - 8, left + width, y + up + 8)
            inside = edge.x0 <= box[0] and box[2] <= edge.x0 + plots.WIDTH_PX * 0.84 and edge.y0 < box[1] < edge.y1
            others = [other for other, dot in zip(taken, dots, strict=False) if dot != (x, y)] + taken[len(dots) :]
            if inside and not any(_overlap(box, other) for other in others):
                break
        else:
            continue  # a name that would cover another is in the table above
        taken.append(box)
        axes.annotate(
            shown,
            (size, loss),
            (9 if side > 0 else -9, up),
            textcoords="offset pixels",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=11,
            color=plots.INK,
            parse_math=False,
        )


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
