"""`edgec bench` against other people's tools and smaller models, whole runs on tiny models. Needs the extra
edgec[gguf]; torch.compile also a C++ compiler. Some minutes.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from command_for_tests import invoke
from models_for_tests import write_causal_lm, write_encoder

from edgec.checkpoint import open_checkpoint
from edgec.export.gguf.plain import write_plain

SHORT = ("--rounds", "1", "--threads", "1", "--prompt-tokens", "8", "--new-tokens", "4", "--batch", "4")


def bench(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    said = invoke(capsys, "bench", *words, *SHORT, "--json")
    assert said.code == 0, said
    rows = json.loads(said.out)["measurements"]
    return {row["contestant"]: row for row in rows}


def test_llama_cpp_s_types_and_a_smaller_model_beside_a_causal_lm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra edgec[gguf]")
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    model = write_causal_lm(tmp_path / "model", **wide)
    small = write_causal_lm(tmp_path / "small", num_hidden_layers=1)
    artifact = write_plain(open_checkpoint(model), tmp_path / "artifact")
    rows = bench(
        capsys, artifact / "model.gguf", "--model", model, "--baseline", "f16", "--baseline", "q8_0",
        "--baseline", "q4_k_m", "--baseline", "int8", "--baseline", "torch-eager",
        "--smaller", small, "--smaller-as", "q8_0",
    )  # fmt: skip
    dense = ["dense f16", "dense q8_0", "dense q4_k_m", "dense int8", "dense torch-eager"]
    assert list(rows) == ["model.gguf", *dense, "smaller small q8_0"]
    for row in rows.values():
        assert {"decode_tok_s", "prefill_tok_s", "peak_rss_bytes"} <= set(row["metrics"]), row["notes"]
        assert row["quality"]["bits_per_byte"] > 0
    kl = {name: row["quality"].get("kl") for name, row in rows.items()}
    assert kl["dense torch-eager"] < 1e-6 < kl["dense q8_0"] < kl["dense q4_k_m"]
    assert kl["model.gguf"] == kl["dense f16"] < kl["dense int8"] < kl["dense q4_k_m"]
    assert kl["smaller small q8_0"] is None
    assert any("bits per weight" in note and "Q6_K" in note for note in rows["dense q4_k_m"]["notes"])
    assert any("its tokens are its own" in note for note in rows["smaller small q8_0"]["notes"])


def test_a_shape_in_onnx_and_gguf_against_both_runtimes_in_one_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra edgec[gguf]")
    rows = bench(
        capsys, "--shape", "llama-tiny", "--target", "onnx-x64", "--target", "gguf-factored", "--baseline", "int4",
        "--baseline", "q4_0", "--baseline", "f16", "--work", tmp_path / "work",
    )  # fmt: skip
    assert list(rows) == [
        "edgec uniform:0.5 (onnx-x64)", "edgec uniform:0.5 (gguf-factored)",
        "dense int4 (genai builder)", "dense q4_0 (llama.cpp)", "dense f16 (llama.cpp)",
    ]  # fmt: skip
    for row in rows.values():
        assert row["metrics"]["decode_tok_s"]["value"] > 0
        assert "random weights: speed only" in row["notes"] and not row["quality"]
    assert (
        rows["edgec uniform:0.5 (gguf-factored)"]["artifact_bytes"] < rows["dense q4_0 (llama.cpp)"]["artifact_bytes"]
    )


def test_torch_compiles_an_encoder_and_a_causal_lm_before_anything_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    pytest.importorskip("llama_cpp", reason="the causal LM's artifact is a GGUF file")
    model = write_causal_lm(tmp_path / "model")
    artifact = write_plain(open_checkpoint(model), tmp_path / "artifact")
    rows = bench(capsys, artifact, "--model", model, "--baseline", "torch-eager", "--baseline", "torch-compile")
    eager, compiled = rows["dense torch-eager"]["metrics"], rows["dense torch-compile"]["metrics"]
    assert compiled["load_s"]["value"] > eager["load_s"]["value"]
    assert compiled["ttft_ms"]["value"] < 1e3 * compiled["load_s"]["value"]
    assert rows["dense torch-compile"]["quality"]["kl"] < 1e-6


def test_a_smaller_encoder_is_judged_by_its_own_similarities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, small = write_encoder(tmp_path / "model"), write_encoder(tmp_path / "small", num_hidden_layers=1)
    texts = [f"{a} of the {b}" for a in ("module", "list", "object", "name") for b in ("class", "method", "value")]
    lines = [
        f"main\ttest\t2017\t1\t{(i * 7) % 6}\t{a}\t{b}"
        for i, (a, b) in enumerate(zip(texts, texts[1:] * 2, strict=False))
    ]
    sts = tmp_path / "pairs.tsv"
    sts.write_text("\n".join(lines * 6) + "\n", encoding="utf-8")
    work = tmp_path / "work"
    rows = bench(
        capsys, "--model", model, "--baseline", "torch-eager", "--smaller", small, "--sts", sts, "--work", work,
        _dense_artifact(model, tmp_path / "artifact"),
    )  # fmt: skip
    row = rows["smaller small int8"]
    assert {"spearman", "spearman_loss"} <= set(row["quality"]) and "cosine" not in row["quality"]
    assert any("another space" in note for note in row["notes"])
    assert rows["dense torch-eager"]["quality"]["cosine"] > 1 - 1e-6


def _dense_artifact(model: Path, out: Path) -> Path:
    from edgec import pipeline

    pipeline.export(pipeline.ExportRequest(model, "onnx-x64", out, plan="dense:fp32", plain=True, quality=False))
    return out
