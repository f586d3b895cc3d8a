"""Shadow runs: a model beside itself diverges nowhere, beside a damaged one it does, and the worst case is named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from command_for_tests import check_failure, invoke

from edgec import pipeline
from edgec.errors import CalibrationError
from edgec.shadow import Case, Shadow, read_traffic


@pytest.fixture
def traffic(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = ['"Once upon a time"', '{"prompt": "The cat sat on the mat."}', "", '{"text": "12 + 30 = ü"}']
    lines += ['"half \\ud83d"']
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_traffic_in_all_its_forms(traffic: Path) -> None:
    found = read_traffic(traffic)
    assert [(p.line, p.text) for p in found] == [
        (1, "Once upon a time"),
        (2, "The cat sat on the mat."),
        (4, "12 + 30 = ü"),
        (5, "half ?"),
    ]
    assert len(read_traffic(traffic, 2)) == 2


BAD = {
    b'"a"\n{"prompt": 3}': r'jsonl:2: expected a string or an object with "prompt" or "text"',
    b'"a"\n\n"b': r"jsonl:3: not JSON",
    b'"a"\n\xff\xfe': r"jsonl:2: not UTF-8 \(byte 4\)",
    b'{"prompt": "a", "prompt": "b"}': r"jsonl:1: key 'prompt' appears twice",
    b"[" * 100_000: r"jsonl:1: JSON nested deeper",
    b'"  "': r"jsonl:1: the prompt is empty",
    b"\n\n": r"no prompts in it",
    b"NaN": r"jsonl:1: NaN is not JSON",
}


@pytest.mark.parametrize("raw", BAD, ids=range(len(BAD)))
def test_malformed_traffic_is_refused_by_line(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(raw)
    with pytest.raises(CalibrationError, match=BAD[raw]):
        read_traffic(path)
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_traffic(tmp_path / "nowhere.jsonl")


def test_the_worst_come_first_and_nan_is_worst() -> None:
    cases = tuple(Case(i, f"p{i}", 4, d, agreement=0.5) for i, d in enumerate((0.1, math.nan, 0.7, 0.0)))
    again = Case(4, "p2", 4, 0.7, agreement=0.5)  # traffic repeats itself, a list of what to read should not
    found = Shadow("causal-lm", (*cases, again), 0)
    assert [c.line for c in found.worst(3)] == [1, 2, 0]
    told = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert told["cases"][1]["divergence"] is None
    assert told["summary"]["mean"] is None


@pytest.mark.slow
def test_an_exact_copy_diverges_nowhere_and_half_of_it_does(
    lm_source: Path, lm_artifact: Path, traffic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = pipeline.export(
        pipeline.ExportRequest(lm_source, "onnx-x64", tmp_path / "exact", plan="dense:fp32", plain=True, quality=False)
    ).out
    told = {}
    for artifact in (exact, lm_artifact):
        said = invoke(capsys, "shadow", lm_source, artifact, "--traffic", traffic, "--json", "-n", 6)
        assert said.code == 0, said.err
        told[artifact] = json.loads(said.out)
    assert told[exact]["summary"]["worst"] < 1e-5
    assert told[exact]["summary"]["top1_agreement"] == 1.0
    assert told[exact]["summary"]["same_answer"] == 1.0
    assert told[lm_artifact]["summary"]["mean"] > 1e-3
    assert [c["line"] for c in told[lm_artifact]["cases"]] == [1, 2, 4, 5]
    shown = invoke(capsys, "shadow", lm_source, lm_artifact, "--traffic", traffic, "--worst", 1, "-n", 6)
    assert shown.code == 0
    assert shown.out.count("prompt  ") == 1


@pytest.mark.slow
def test_an_encoder(
    encoder_source: Path, encoder_artifact: Path, traffic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = invoke(capsys, "shadow", encoder_source, encoder_artifact, "--traffic", traffic, "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["task"] == "encoder"
    assert all(0 < c["divergence"] < 0.5 for c in found["cases"])


def test_another_model_is_refused(
    encoder_source: Path, lm_artifact: Path, traffic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = invoke(capsys, "shadow", encoder_source, lm_artifact, "--traffic", traffic)
    check_failure(said, 1, "was made from another model")
