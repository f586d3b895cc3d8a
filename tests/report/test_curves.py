"""Plots with two axes, and what the report, the CSV and the tables say about limits."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from edgec.errors import CheckpointError
from edgec.records import Measurement, Roofline, Spread
from edgec.report import curves, read_frontier, tables, text, to_csv, to_json, to_markdown, write_report
from edgec.report.frontier_records import Frontier, Point
from edgec.report.frontier_tables import to_json as frontier_json


def row(name: str, size: int = 1_000_000, **changes: object) -> Measurement:
    record: dict[str, object] = {
        "metrics": {"decode_tok_s": Spread(100.0, 90.0, 110.0, 5), "rss_growth_bytes": Spread(2e6, 2e6, 2e6, 5)},
        "artifact_bytes": size,
        "quality": {"kl": 0.1},
        "kv_cache_bytes": 3_000_000,
        "ceilings": {"read_bytes_s": 5.5e10, "integer_op_s": 6.8e11},
        "roofline": Roofline(9_000_000, 1_000_000, 5.5e10, 130.0, 1.3),
        "settings": {"energy": "this machine does not tell"},
        **changes,
    }
    return Measurement(name, "local", 2, "causal-lm", **record)  # type: ignore[arg-type]


def test_the_front_is_what_nothing_beats_in_both() -> None:
    points = [("big", 9.0, 0.1), ("worse", 9.0, 0.2), ("small", 1.0, 0.5), ("between", 4.0, 0.5), ("middle", 4.0, 0.3)]
    assert [name for name, _, _ in curves.front(points)] == ["small", "middle", "big"]


def test_quality_is_drawn_where_two_rows_share_a_figure() -> None:
    rows = [row("a", quality={"cosine": 0.99, "kl": math.nan}), row("b", 2_000_000, quality={"cosine": 1.0})]
    made = curves.size_against_quality(rows, "a")
    assert made is not None and "cosine" in made.note
    assert "1 MB" in made.svg and ">a<" in made.svg and ">b<" in made.svg
    assert curves.size_against_quality([rows[0], row("c", quality={"kl": 0.2})], "a") is None


def test_a_loss_of_rounding_does_not_press_the_others_together() -> None:
    def made(*losses: float) -> tuple[list[float], bool]:
        drawn, raised = curves._at_the_bottom([(str(loss), 1.0, loss) for loss in losses])
        return [loss for _, _, loss in drawn], raised

    assert made(1e-12, 0.003, 0.4) == ([0.001, 0.003, 0.4], True)
    assert made(0.0, 0.3) == ([pytest.approx(0.1), 0.3], True)
    for as_they_are in ((0.003, 0.4), (-0.001, 1e-7, 0.2), (0.0, 1e-9)):
        assert made(*as_they_are) == (list(as_they_are), False)
    shown = curves.size_against_quality([row("dense", quality={"kl": 0.0}), row("b", quality={"kl": 0.1})], "b")
    assert shown is not None and "what loses less than 0.00001 stands at the bottom" in shown.note


def test_twenty_points_are_drawn_without_names() -> None:
    made = curves.size_against_quality([row(f"n{i}", 10**6 + i, quality={"kl": 0.1 + i}) for i in range(20)], "n0")
    assert made is not None and ">n3<" not in made.svg


def test_a_name_is_never_a_formula_or_markup() -> None:
    made = curves.size_against_quality([row("$x_2$ <b>"), row("b", quality={"kl": 0.0})], "b")
    assert made is not None and "$x_2$ &lt;b&gt;" in made.svg


def test_healing_is_a_curve_from_its_start_to_its_best() -> None:
    made = curves.healing([(0.0, 0, 1.2), (5.0, 10, 0.6), (9.0, 20, math.nan), (12.0, 30, 0.7)])
    assert made is not None and "1.20 → 0.600" in made.note
    assert curves.healing([(0.0, 0, 1.2)]) is None and curves.healing([]) is None


def test_a_report_of_everything_has_unique_ids_and_loads_nothing(tmp_path: Path) -> None:
    point = Point("p", "edgec", "svd", 4, 4.0, 100, "ort", figures={"kl": 0.1})
    frontier = Frontier("m", "onnx-x64", "kl", "c", "e", "off", 0.02, {}, (point,), ())
    rows = [row("a"), row("b", 2_000_000, quality={"kl": 0.05})]
    path = write_report(
        tmp_path / "r.html", title="t", measurements=rows, healing=[(0.0, 0, 1.0), (1.0, 1, 0.5)], frontier=frontier
    )
    page = path.read_text("utf-8")
    assert max(Counter(re.findall(r'\bid="([^"]+)"', page)).values()) == 1
    assert all(target.startswith("#") for target in re.findall(r'(?:href|src)="([^"]*)"', page))
    for words in ("Limit ÷ decode", "1.30 ×", "130 tok/s, 10.0 MB a token", "3.00 MB", "memory reads 55.0 GB/s",
                  "Size against quality", "Healing", "Frontier", "Energy: this machine does not tell."):  # fmt: skip
        assert words in page, words


def test_energy_that_was_measured_is_not_called_missing(tmp_path: Path) -> None:
    rows = [row("a", metrics={"joules_token": Spread(0.5, 0.4, 0.6, 5)}, settings={"energy": "RAPL package-0"})]
    page = write_report(tmp_path / "r.html", title="t", measurements=rows).read_text("utf-8")
    assert "Energy, J/token" in page and "Energy: " not in page.split("Not measured")[1]


def test_the_terminal_and_markdown_say_what_a_token_reads() -> None:
    line = text.memory_line(row("a"))
    assert line == (
        "a token reads 9.00 MB of weights and 1.00 MB of cache: at most 130 tok/s, 1.30 × the measured; "
        "KV cache 3.00 MB; 2.00 MB of RAM per 1000 tokens more"
    )
    held = {"peak_rss_bytes": Spread(400.0, 400.0, 400.0, 3), "runtime_rss_bytes": Spread(100.0, 90.0, 110.0, 3)}
    full = row("a")
    assert text.memory_line(replace(full, metrics={**full.metrics, **held}, artifact_bytes=240)).endswith(
        "more; beyond the empty runtime 1.25 × the file"
    )
    held["mapped_rss_bytes"] = Spread(2e7, 2e7, 2e7, 3)
    assert text.memory_line(replace(full, metrics={**full.metrics, **held}, artifact_bytes=240)).endswith(
        "1.25 × the file; at the end 20.0 MB of the memory are pages of files"
    )
    assert text.memory_line(row("b", metrics={}, roofline=None, kv_cache_bytes=0)) == ""
    assert "1.30 × (130 tok/s, 10.0 MB a token) | 3.00 MB (2.00 MB of RAM per 1000 tokens)" in to_markdown([row("a")])
    assert json.loads(to_json([row("a")]))["measurements"][0]["roofline"]["distance"] == 1.3


def test_csv_has_a_line_per_contestant_and_figure() -> None:
    found = list(csv.DictReader(io.StringIO(to_csv([row('=cmd("x"),\n1'), row("b", roofline=None, quality={})]))))
    assert tuple(found[0]) == tables.CSV_COLUMNS
    assert {line["contestant"] for line in found} == {'\'=cmd("x"),�1', "b"}
    by_name = {line["metric"]: line for line in found if line["contestant"] != "b"}
    assert (by_name["decode_tok_s"]["unit"], by_name["decode_tok_s"]["median"]) == ("tok/s", "100.0")
    assert (by_name["decode_tok_s"]["low"], by_name["decode_tok_s"]["n"]) == ("90.0", "5")
    assert by_name["roofline_distance"]["median"] == "1.3" and by_name["quality_kl"]["median"] == "0.1"
    assert by_name["artifact_bytes"]["unit"] == "B" and by_name["artifact_bytes"]["n"] == ""
    assert by_name["rss_growth_bytes"]["unit"] == "B/1000 tokens"


def test_a_frontier_comes_back_as_it_was_written(tmp_path: Path) -> None:
    points = (Point("p", "edgec", "svd", 4.0, 4.1, 100, "ort", False, True, {"kl": 0.1}),)
    frontier = Frontier("m", "onnx-x64", "kl", "c", "e", "off", 0.02, {"perplexity": 17.0}, points, (), ("x",))
    path = tmp_path / "frontier.json"
    path.write_text(frontier_json(frontier))
    assert read_frontier(path) == frontier


@pytest.mark.parametrize(
    "change",
    [{"points": []}, {"points": [{}]}, {"metric": "weather"}, {"dense": 1}, {"slack": "much"}, {"verdicts": [1]}],
    ids=str,
)
def test_a_frontier_that_is_none(tmp_path: Path, change: dict[str, object]) -> None:
    points = (Point("p", "edgec", "svd", 4.0, 4.1, 100, "ort", figures={"kl": 0.1}),)
    sound = json.loads(frontier_json(Frontier("m", "t", "kl", "c", "e", "off", 0.02, {}, points, ())))
    path = tmp_path / "frontier.json"
    path.write_text(json.dumps(sound | change))
    with pytest.raises(CheckpointError, match=re.escape("frontier.json")):
        read_frontier(path)
