"""Terminal, JSON and Markdown: the same figures, at most 100 columns, and nothing that a name could smuggle in."""

from __future__ import annotations

import json
import math

import pytest
from rich.console import Console
from rich.table import Table

from edgec.errors import BenchError
from edgec.records import Choice, Measurement, Plan, Spec, Spread
from edgec.report import measurement_table, plan_table, text, to_json, to_markdown

HOSTILE = "[bold red]x[/] \x1b[31m | `a` <b>&amp; *_ \n# y " + "z" * 200


def row(name: str, **changes: object) -> Measurement:
    metrics = {
        key: Spread(1234.5, 1200.0, 1300.0, 5)
        for key in ("decode_tok_s", "prefill_tok_s", "ttft_ms", "items_s", "item_ms", "load_s", "peak_rss_bytes")
    }
    record = {"metrics": metrics, "artifact_bytes": 1_240_000_000, "quality": {"kl": 0.1, "top1": 0.9}, **changes}
    return Measurement(name, "local", 2, "causal-lm", {"rounds": 5}, **record)  # type: ignore[arg-type]


def printed(table: Table) -> str:
    console = Console(width=100, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_table_of_everything_fits_100_columns() -> None:
    shown = printed(measurement_table([row("a contestant"), row(HOSTILE, notes=(HOSTILE,))], "title"))
    assert max(map(len, shown.splitlines())) <= 100
    assert "\x1b" not in shown
    rows = [row(n, metrics={k: v for k, v in row(n).metrics.items() if "item" not in k}) for n in ("one", HOSTILE)]
    shown = printed(measurement_table(rows))
    for words in ("one", "1.24 GB", "1,234", "±4 %", "decode", "first token", "0.1000", "[bold red]"):
        assert words in shown, words


def test_missing_figures_are_dashes_and_failures_are_noted() -> None:
    shown = printed(measurement_table([row("a"), row("b", metrics={}, quality={}, notes=("failed: round 1: hang",))]))
    assert "b: failed: round 1: hang" in shown and text.MISSING in shown


def test_a_plan_fits_too() -> None:
    long = Choice("model.layers.0." + "x" * 90, "linear", (8192, 2048), Spec("svd", (800,)), "int4-b32", 4096, 1, 0.1)
    train = Spec("tensor_train", (96, 384, 96), ((64, 1), (128, 1), (1, 32), (1, 64)))
    other = Choice(HOSTILE, "linear", (8192, 2048), train, "int8-b256-zp", 10**9, 1)
    shown = printed(plan_table(Plan("f", "onnx-x64", "4bpw", (long, other), 10, (HOSTILE,))))
    assert max(map(len, shown.splitlines())) <= 100
    assert "8192x2048" in shown and "svd χ=800" in shown and "linear bpw" in shown


def test_json_is_whole_and_refuses_what_is_no_number() -> None:
    record = json.loads(to_json([row(HOSTILE)], machine={"cpu": "x"}, commands=["edgec"]))
    assert record["measurements"][0]["contestant"] == HOSTILE and record["version"] == 2
    assert record["measurements"][0]["metrics"]["decode_tok_s"] == {"value": 1234.5, "low": 1200, "high": 1300, "n": 5}
    with pytest.raises(BenchError, match="NaN"):
        to_json([row("a", metrics={"load_s": Spread(math.nan, 0, 0, 1)})])


def test_markdown_cannot_be_broken_by_a_name() -> None:
    lines = to_markdown([row("plain"), row(HOSTILE)]).splitlines()
    bars = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}
    assert len(bars) == 1
    assert not any("<b>" in line or "\x1b" in line for line in lines)


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0 B"), (812, "812 B"), (9_800_000, "9.80 MB"), (1.24e9, "1.24 GB"), (math.nan, "–")]
)
def test_sizes(value: float, shown: str) -> None:
    assert text.size(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (0.01234, "0.0123"), (1.25, "1.25"), (31.04, "31.0"), (1188.4, "1,188"), (-2, "-2.00")],
)
def test_numbers(value: float, shown: str) -> None:
    assert text.number(value) == shown


def test_quality_intervals_are_joined() -> None:
    assert text.quality_items({"sts": 0.5, "sts_low": 0.4, "sts_high": 0.6, "odd_low": 1.0}) == [
        ("STS-B", "0.5000 [0.4000…0.6000]"),
        ("odd low", "1.0000"),
    ]
