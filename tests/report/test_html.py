"""The page: self-contained, well-formed, escaped, the same twice, and honest about what is missing."""

from __future__ import annotations

import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edgec.errors import OutputError
from edgec.records import Choice, Measurement, Plan, Spec, Spread
from edgec.report import write_report
from edgec.report.plots import layer_strips, place_of

HOSTILE = "<script>alert('x')</script>\"&' $x_{1$ \x1b[31m\u202e ]]> --> 漢字 {{ 7 * 7 }} " + "y" * 300
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Tags, ids and text of a page; fails on what is not nested properly."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags, self.ids, self.words, self.open = Counter[str](), list[str](), list[str](), list[str]()
        self.attributes: list[tuple[str, str]] = []
        self.feed(source)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(k, v or "") for k, v in attrs]
        self.ids += [v or "" for k, v in attrs if k == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(k, v or "") for k, v in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def row(name: str = "small", task: str = "encoder", **changes: object) -> Measurement:
    rates = {"encoder": ("items_s", "item_ms"), "causal-lm": ("decode_tok_s", "prefill_tok_s", "ttft_ms")}[task]
    metrics = {key: Spread(200.0, 190.0, 215.0, 5) for key in (*rates, "load_s")}
    metrics |= {"peak_rss_bytes": Spread(9e7, 9e7, 9.1e7, 5), "runtime_rss_bytes": Spread(5e7, 5e7, 5e7, 5)}
    record = {"settings": {"rounds": 5, "batch": 32}, "metrics": metrics, "artifact_bytes": 13_100_000, **changes}
    return Measurement(name, "local", 2, task, **record)  # type: ignore[arg-type]


def plan(blocks: int = 2, names: str = "model.layers.{}.mlp.up_proj") -> Plan:
    choices = [
        Choice(names.format(i), "linear", (64, 32), Spec("svd", (8,)), "int4-b32", 500, 1000, error=0.1 + i)
        for i in range(blocks)
    ]
    choices.append(Choice("model.embed_tokens", "embedding", (100, 32), Spec("dense"), "int8-b32", 3600, 0))
    return Plan("f" * 64, "onnx-x64", "4bpw", tuple(choices), 1000, ("a note",))


def page(path: Path, **changes: object) -> Page:
    settings: dict[str, object] = {"title": "A title", "measurements": [row()]}
    return Page(write_report(path / "r.html", **{**settings, **changes}).read_text("utf-8"))  # type: ignore[arg-type]


def test_it_says_what_was_measured(tmp_path: Path) -> None:
    rows = [row(quality={"sts": 0.8651, "sts_low": 0.85, "sts_high": 0.88}), row("dense", artifact_bytes=90_900_000)]
    found = page(
        tmp_path,
        measurements=[*rows, row("lm", "causal-lm")],
        plan=plan(),
        profile_entropies={"model.layers.0.mlp.up_proj": 3.5},
        quality=[{"model": "a", "cosine": 0.98}, {"model": "b", "extra": None}],
        machine={"processor": "A fast one"},
        commands=["edgec bench out"],
        reference="dense",
        not_measured=["The weather."],
    )
    for words in (
        "A title", "13.1 MB", "0.144 ×", "0.8651 [0.8500…0.8800]", "Sentence encoder", "batch 32",
        "Causal language model", "A fast one", "edgec bench out", "The weather.", "onnx-x64", "1.95", "svd χ=8",
        "All 3 planned layers", "Entanglement entropy", "Quality of dense, lm.", "cold disk", "cosine",
    ):  # fmt: skip
        assert words in found.text, words
    assert found.tags["svg"] == (1 + 4) + (1 + 5) + 4


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.html", title="t", measurements=[row()], plan=plan())
    source = path.read_text("utf-8")
    found = Page(source)
    assert not {"script", "link", "img", "iframe", "object", "use", "image", "foreignobject"} & set(found.tags)
    assert not [a for a in found.attributes if a[0] in ("src", "href", "xlink:href") or a[0].startswith("on")]
    assert not re.findall(r"@import|url\((?!#)", source)
    assert "default-src 'none'" in source and "prefers-color-scheme: dark" in source and "viewport" in source
    assert set(re.findall(r"https?://[^\"'<\s]+", source)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_ids_are_unique_in_the_page(tmp_path: Path) -> None:
    found = page(tmp_path, measurements=[row("a"), row("b"), row("c", "causal-lm")], plan=plan())
    assert len(found.ids) == len(set(found.ids))


def test_every_name_is_escaped(tmp_path: Path) -> None:
    hostile_row = row(HOSTILE, notes=(HOSTILE,), quality={HOSTILE: 0.5}, settings={HOSTILE: HOSTILE})
    found = page(
        tmp_path,
        title=HOSTILE,
        measurements=[hostile_row, row("failed " + HOSTILE, metrics={})],
        plan=plan(names=HOSTILE.replace("{", "").replace("}", "") + ".layers.{}." + "<b>q</b>"),
        profile_entropies={HOSTILE: 1.0},
        quality=[{HOSTILE: HOSTILE}],
        machine={HOSTILE: HOSTILE},
        commands=[HOSTILE],
        not_measured=[HOSTILE],
        subject=HOSTILE,
        reference=HOSTILE,
    )
    assert "script" not in found.tags and "b" not in {t for t in found.tags if t == "q"}
    assert "<script>alert" in found.text and "{{ 7 * 7 }}" in found.text
    raw = (tmp_path / "r.html").read_text("utf-8")
    assert "\x1b" not in raw and "\u202e" not in raw and "<script" not in raw


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    made = [
        write_report(tmp_path / n, title="t", measurements=[row()], plan=plan(), machine={}).read_bytes() for n in "ab"
    ]
    assert made[0] == made[1]


def test_failed_and_empty_are_said(tmp_path: Path) -> None:
    failed = row("broken", metrics={}, notes=("failed: round 1: killed by SIGSEGV",))
    found = page(tmp_path, measurements=[row(), failed])
    assert "broken (failed)" in found.text and "SIGSEGV" in found.text
    assert "Speed and memory of broken: every attempt failed" in found.text
    assert "Nothing was timed" in page(tmp_path, measurements=[]).text
    nan = row("odd", metrics={"items_s": Spread(math.nan, math.nan, math.nan, 1)}, artifact_bytes=0)
    assert "odd" in page(tmp_path, measurements=[nan]).text


def test_the_headline_never_compares_across_tasks(tmp_path: Path) -> None:
    rows = [row("x"), row("dense", "causal-lm")]
    assert "×" not in page(tmp_path, measurements=rows, subject="x", reference="dense").text


def test_a_deep_plan_stays_small(tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.html", title="t", measurements=[], plan=plan(blocks=300))
    assert path.stat().st_size < 1_000_000


def test_a_plan_of_dense_layers_outside_blocks_has_no_strip_of_ranks() -> None:
    dense = Plan("f", "t", "b", (Choice("head", "head", (4, 4), Spec("dense"), "fp32", 64, 0),))
    assert layer_strips(dense, None) == [] == layer_strips(dense, {"also.outside": 1.0})


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.12.self_attn.q_proj", ("self_attn.q_proj", 12)),
        ("encoder.layer.0.output.dense", ("output.dense", 0)),
        ("h.3", ("h", 3)),
        ("model.embed_tokens", None),
        ("layer12", None),
        ("x.99999999999999.y", None),
    ],
)
def test_layers_are_placed_by_their_block(name: str, place: tuple[str, int] | None) -> None:
    assert place_of(name) == place


def test_an_unwritable_place_is_an_output_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError):
        write_report(tmp_path / "folder", title="t", measurements=[])
    assert [p.name for p in tmp_path.rglob("*")] == ["folder"]
