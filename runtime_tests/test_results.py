"""RESULTS.md is put together from sections that replace one another and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runtime_tests import results


def test_a_section_replaces_its_own_and_no_other() -> None:
    first = results.merged("", {"streaming": results.section("streaming", "first run", 60.0)})
    second = results.merged(first, {"minilm": results.section("minilm", "1.5 | 2", 60.0)})
    third = results.merged(second, {"streaming": results.section("streaming", "new", 60.0)})
    assert results.merged(third, {}) == third
    assert [n for n in results.FIGURES if f"<!-- {n} -->" in third] == ["minilm", "streaming"]
    assert third.index("1.5 | 2") < third.index("new")
    assert "first run" not in third


def test_a_command_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "RESULTS.md"
    monkeypatch.setattr(results, "FILE", kept)
    monkeypatch.setattr(results, "FIGURES", {"good": ("Good", "edgec --version"), "bad": ("Bad", "edgec no-such-verb")})
    assert results.main(["good"]) == 0
    before = kept.read_bytes()
    assert b"edgec 0." in before
    assert results.main(["bad"]) == 1
    assert kept.read_bytes() == before


def test_every_figure_is_a_plain_command() -> None:
    for _, command in results.FIGURES.values():
        assert re.fullmatch(r"(python -m runtime_tests\.[\w.]+|edgec)( [\w.,:/-]+)*", command)
