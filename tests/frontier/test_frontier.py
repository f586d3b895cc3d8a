"""`edgec frontier` from the command line: the folder that it writes, and what it refuses before any work."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from command_for_tests import check_failure, invoke
from models_for_tests import tree

pytestmark = pytest.mark.slow


def test_a_causal_lm_from_the_command_line(
    capsys: pytest.CaptureFixture[str], lm_source: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "frontier"
    words = ("frontier", lm_source, "--bits", "4.5", "--calibration", text_file, "--peers", "rtn,svd", "-o", out)
    said = invoke(capsys, *words, "--json")
    assert (said.code, said.err) == (0, ""), said
    found = json.loads(said.out)
    assert sorted(tree(out)) == ["frontier.html", "frontier.json", "frontier.md", "frontier.svg"]
    assert json.loads((out / "frontier.json").read_text(encoding="utf-8")) == found
    assert (found["metric"], found["target"], found["heal"]) == ("kl", "onnx-x64", "off")
    (verdict,) = found["verdicts"]
    assert verdict["plan"] == "edgec 4.5"
    assert verdict["plan_bpw"] <= 4.5
    assert verdict["verdict"] in ("ahead", "within the noise")  # uniform RTN is among what the planner tries
    names = [p["name"] for p in found["points"]]
    assert "RTN int4-b32" in names
    assert "SVD + int8 at 4.5" in names
    ElementTree.fromstring((out / "frontier.svg").read_text(encoding="utf-8"))
    before = tree(out)
    check_failure(invoke(capsys, *words), 1, r"frontier: already exists; .*--force")
    assert tree(out) == before


def test_refusals_come_before_any_work(
    capsys: pytest.CaptureFixture[str], lm_source: Path, text_file: Path, tmp_path: Path
) -> None:
    words = ("frontier", lm_source, "--calibration", text_file, "-o", tmp_path / "out")
    for more, message in (
        (("--bits", "four"), r"--bits 'four': expected numbers from 0\.1 to 32"),
        (("--bits", "0"), r"--bits '0'"),
        (("--bits", "nan"), r"--bits 'nan'"),
        (("--peers", "awq"), r"--peers 'awq': expected all, none, or some of"),
        (("--heal", "auto"), r"--heal auto: a comparison heals all contestants alike"),
        (("--target", "toaster"), r"unknown target 'toaster'"),
        (("--sts", text_file), r"--sts measures sentence encoders; .*tiny-llama is a causal LM"),
    ):
        check_failure(invoke(capsys, *words, *more), 2, message)
    short = tmp_path / "short.txt"
    short.write_text("too little", encoding="utf-8")
    check_failure(invoke(capsys, *words, "--eval-text", short), 1, r"short\.txt: \d+ tokens; at least 2048")
    assert not (tmp_path / "out").exists()
