"""A frontier for people: hostile names stay text, missing numbers stay missing, every format tells the same."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from edgec.report import frontier_page, frontier_tables
from edgec.report.frontier_records import AHEAD, ALONE, Frontier, Point, Verdict

HOSTILE = "<script>alert(1)</script>|$\\x$\x1b[31m"


def _frontier(metric: str = "kl") -> Frontier:
    def point(name: str, family: str, bpw: float, value: float, **more: bool) -> Point:
        figures = {metric: value, f"{metric}_low": value * 0.9, f"{metric}_high": value * 1.1, "perplexity": 12.5}
        return Point(name, family, "12× dense int4-b32", 4.0, bpw, int(1000 * bpw), "onnx-x64", figures=figures, **more)

    points = (
        point("edgec 4", "edgec", 4.0, 0.01),
        point("edgec 2.5", "edgec", 2.5, 0.1),
        point("edgec 2.5, healed", "edgec", 2.5, 0.05, healed=True),
        point(HOSTILE, "RTN", 4.5, 0.02),
        point("GPTQ int3-b32", "GPTQ", 3.5, 0.03, simulated=True),
        point("broken", "SVD", 4.0, math.nan),
    )
    verdicts = (
        Verdict(4.0, "edgec 4", 4.0, HOSTILE, 4.5, -0.01, -0.012, -0.008, AHEAD),
        Verdict(2.5, "edgec 2.5", 2.5, None, None, None, None, None, ALONE),
    )
    return Frontier(
        HOSTILE, "onnx-x64", metric, "calib.txt, 9 tokens", "valid.txt", "off", 0.1, {"perplexity": 11.0}, points,
        verdicts, (f"ggml: {HOSTILE}",),
    )  # fmt: skip


def test_json_has_every_number_and_no_nan() -> None:
    found = json.loads(frontier_tables.to_json(_frontier()))
    assert [p["name"] for p in found["points"]][:2] == ["edgec 4", "edgec 2.5"]
    assert found["points"][5]["figures"]["kl"] is None
    assert found["verdicts"][0]["difference"] == -0.01
    assert len(frontier_tables.to_json(_frontier(), indent=None).splitlines()) == 1


def test_markdown_has_verdicts_and_rows_by_size() -> None:
    text = frontier_tables.to_markdown(_frontier())
    assert "<script>" not in text
    assert "\x1b" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert "-0.0120 … -0.0080 | ahead" in rows[1]
    assert "no peer so small" in rows[2]
    assert [row.split(" | ")[1] for row in rows[4:]] == ["4.500", "4.000", "4.000", "3.500", "2.500", "2.500"]
    assert "nothing: simulated" in next(row for row in rows if "int3" in row)
    assert r"0.0100 \[0.0090 0.0110\]" in next(row for row in rows[4:] if "edgec 4" in row)
    assert "Not run:" in text


@pytest.mark.parametrize("metric", ["kl", "sts_loss", "cosine_loss"])
def test_the_page_is_self_contained_and_hostile_names_are_text(metric: str) -> None:
    page = frontier_page.page(_frontier(metric))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/", "")
    assert page.count("<svg") == 1
    assert 'class="good"' in page


def test_the_svg_stands_alone_in_light_and_dark() -> None:
    svg = frontier_page.standalone_svg(_frontier())
    root = ElementTree.fromstring(svg)
    words = " ".join("".join(node.itertext()) for node in root.iter() if node.tag.endswith("text"))
    for part in ("edgec", "edgec, healed", "RTN", "GPTQ", "bits per weight"):
        assert part in words
    assert "prefers-color-scheme: dark" in svg
    assert svg == frontier_page.standalone_svg(_frontier())  # the same bytes again


def test_losses_at_and_below_zero_can_be_drawn() -> None:
    found = _frontier("sts_loss")
    below = Point("lucky", "RTN", "int8", None, 8.5, 8500, "onnx-x64", figures={"sts_loss": -0.0004})
    drawn = frontier_page.plot(Frontier(**{**vars(found), "points": (*found.points, below)}))
    ElementTree.fromstring(drawn.svg)


def test_terminal_tables_fit() -> None:
    console = Console(width=100, record=True, file=None, force_terminal=False, quiet=True)
    for table in frontier_tables.terminal_tables(_frontier()):
        measured = console.measure(table)
        assert measured.minimum <= 100
