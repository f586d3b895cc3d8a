"""`edgec eval` and `edgec bench` on tiny models: figures for a person and for a program, baselines beside them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_for_tests import check_failure, invoke
from models_for_tests import set_weight, write_encoder

from edgec.calibration import load_text

pytestmark = pytest.mark.slow

ONE_ROUND = ("--rounds", "1", "--threads", "1")
LM_ROUND = (*ONE_ROUND, "--prompt-tokens", "8", "--new-tokens", "4")


@pytest.fixture(scope="session")
def sts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in the form of STS-Benchmark, scored by the share of common words."""
    draw = random.Random(0)
    items = [" ".join(item.split()[:12]) for item in load_text().items[:60]]
    lines = []
    for _ in range(80):
        a, b = draw.choice(items), draw.choice(items)
        score = 5 * len(set(a.split()) & set(b.split())) / len(set(a.split()) | set(b.split()))
        lines.append("\t".join(["main", "test", "2017", "1", f"{score:.2f}", a, b]))
    path = tmp_path_factory.mktemp("sts") / "pairs.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _json(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Any:
    said = invoke(capsys, *words, "--json")
    assert (said.code, said.err) == (0, ""), said
    return json.loads(said.out)


def test_eval_repeats_what_the_export_measured(
    capsys: pytest.CaptureFixture[str],
    lm_artifact: Path,
    lm_source: Path,
    encoder_artifact: Path,
    encoder_source: Path,
    text_file: Path,
) -> None:
    for artifact, model in ((lm_artifact, lm_source), (encoder_artifact, encoder_source)):
        found = _json(capsys, "eval", artifact, "--model", model, "--calibration", text_file)
        recorded = json.loads((artifact / "edgec.json").read_text(encoding="utf-8"))["quality"]
        assert found == pytest.approx(recorded)
    said = invoke(capsys, "eval", lm_artifact, "--model", lm_source, "--calibration", text_file)
    assert said.code == 0
    assert "perplexity ratio" in said.out
    assert "text.txt, validate split" in said.out


def test_eval_adds_spearman_with_its_interval(
    capsys: pytest.CaptureFixture[str], encoder_artifact: Path, encoder_source: Path, text_file: Path, sts: Path
) -> None:
    found = _json(capsys, "eval", encoder_artifact, "--model", encoder_source, "--calibration", text_file, "--sts", sts)
    assert found["spearman_dense"] - found["spearman"] == pytest.approx(found["spearman_loss"])
    assert found["spearman_loss_low"] <= found["spearman_loss"] <= found["spearman_loss_high"]
    assert -1 <= found["spearman"] <= 1


def test_eval_refuses_what_cannot_be_compared(
    capsys: pytest.CaptureFixture[str],
    lm_artifact: Path,
    lm_source: Path,
    encoder_artifact: Path,
    encoder_source: Path,
    sts: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    check_failure(
        invoke(capsys, "eval", lm_artifact, "--model", lm_source, "--calibration", text_file, "--sts", sts),
        2,
        r"--sts measures sentence encoders",
    )
    check_failure(
        invoke(
            capsys, "eval", encoder_artifact, "--model", encoder_source, "--calibration", text_file, "--sts", text_file
        ),
        2,
        r"text\.txt: not an STS-Benchmark file",
    )
    missing = tmp_path / "no.tsv"
    check_failure(
        invoke(
            capsys, "eval", encoder_artifact, "--model", encoder_source, "--calibration", text_file, "--sts", missing
        ),
        1,
        r"no\.tsv: .*No such file",
    )
    other = write_encoder(tmp_path / "other")
    set_weight(other, "layer.0.intermediate.dense.weight", 0.5)
    check_failure(
        invoke(capsys, "eval", encoder_artifact, "--model", other, "--calibration", text_file),
        1,
        r"encoder-half was made from sha256:.*, .*other is sha256:",
    )
    check_failure(
        invoke(capsys, "eval", encoder_artifact, "--model", lm_source), 1, r"encoder-half was made from sha256:"
    )


def test_bench_an_encoder_against_its_baselines(
    capsys: pytest.CaptureFixture[str],
    encoder_artifact: Path,
    encoder_source: Path,
    text_file: Path,
    sts: Path,
    tmp_path: Path,
) -> None:
    baselines = [word for name in ("fp32", "int8", "int4") for word in ("--baseline", name)]
    body = _json(
        capsys, "bench", encoder_artifact, "--model", encoder_source, *baselines, "--calibration", text_file,
        "--sts", sts, *ONE_ROUND, "--batch", "4", "--work", tmp_path / "work", "--report", tmp_path / "report.html",
    )  # fmt: skip
    rows = {row["contestant"]: row for row in body["measurements"]}
    assert list(rows) == ["encoder-half", "dense fp32", "dense int8", "dense int4"]
    for row in rows.values():
        assert {"items_s", "item_ms", "load_s", "peak_rss_bytes"} <= set(row["metrics"]), row["notes"]
        assert row["threads"] == 1
        assert row["settings"]["batch"] == 4
        assert {"cosine", "spearman", "spearman_loss_low", "spearman_loss_high"} <= set(row["quality"])
    assert rows["dense fp32"]["quality"]["cosine"] > 1 - 1e-5 > rows["encoder-half"]["quality"]["cosine"]
    assert rows["encoder-half"]["artifact_bytes"] < rows["dense int8"]["artifact_bytes"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "encoder-half" in page
    assert "dense int4" in page
    assert body["machine"]["python"]


def test_bench_two_causal_lms_prints_tables(
    capsys: pytest.CaptureFixture[str], lm_artifact: Path, lm_source: Path, text_file: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(lm_artifact, tmp_path / "the-same"))
    said = invoke(
        capsys, "bench", lm_artifact, other, "--model", lm_source, "--calibration", text_file, *LM_ROUND
    )  # fmt: skip
    assert said.code == 0, said
    flat = " ".join(said.out.split())
    for part in ("lm-half ÷ the-same", "ratio of medians", "decode", "prefill", "peak ram", "KL, nats"):
        assert part in flat
    assert {"first", "token"} <= set(flat.split())  # one header, wrapped where the numbers are wide
    assert not said.err


def test_bench_a_shape_against_the_builders_int4(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    body = _json(capsys, "bench", "--shape", "llama-tiny", *LM_ROUND, "--work", tmp_path / "work")
    assert [row["contestant"] for row in body["measurements"]] == ["edgec uniform:0.5", "dense int4 (genai builder)"]
    assert all({"decode_tok_s", "prefill_tok_s", "ttft_ms"} <= set(row["metrics"]) for row in body["measurements"])
    (cost,) = body["exports"]
    assert cost["seconds"] > 0 < cost["peak_rss_bytes"]


def test_a_compressed_folder_is_measured_in_torch(
    capsys: pytest.CaptureFixture[str], lm_source: Path, text_file: Path, tmp_path: Path
) -> None:
    """Beside the same plan's export: the same loss, as near as floats come to the runtime's integer products."""
    folder, exported = tmp_path / "factored", tmp_path / "exported"
    common = ("--target", "onnx-x64", "--calibration", text_file)
    assert invoke(capsys, "compress", lm_source, "--plan", "uniform:0.5", *common, "-o", folder).code == 0
    assert invoke(capsys, "export", folder, *common, "-o", exported).code == 0
    words = (folder, exported, "--model", lm_source, "--calibration", text_file, *LM_ROUND)
    page = tmp_path / "report.html"
    torch_row, onnx_row = _json(capsys, "bench", *words, "--report", page)["measurements"]
    assert "uniform:0.5" in page.read_text(encoding="utf-8")  # the plan of the first one
    assert torch_row["metrics"]["decode_tok_s"]["value"] > 0
    assert any("factored in torch" in note for note in torch_row["notes"])
    assert torch_row["artifact_bytes"] == (folder / "model.safetensors").stat().st_size
    assert torch_row["quality"]["kl"] == pytest.approx(onnx_row["quality"]["kl"], rel=0.2)
