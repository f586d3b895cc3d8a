"""Every verb of the command line on tiny models: what it prints, what a program reads, what it writes."""

from __future__ import annotations

import json
import os
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_for_tests import Said, check_failure, finish, invoke, start
from models_for_tests import tree
from rich.console import Console

from edgec import __version__, console, pipeline
from edgec.inspection import Finding
from edgec.records import Plan

VERBS = (
    "export",
    "profile",
    "plan",
    "compress",
    "eval",
    "run",
    "bench",
    "frontier",
    "shadow",
    "advise",
    "inspect",
    "targets",
    "doctor",
)


def _json(said: Said) -> Any:
    """The one JSON document on stdout, with nothing else there or on stderr."""
    assert (said.code, said.err) == (0, ""), said
    assert len(said.out.splitlines()) == 1
    return json.loads(said.out)


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    said = invoke(capsys, verb, "--help")
    assert said.code == 0
    assert not said.err
    assert f"Usage: edgec {verb}" in said.out
    assert "--json" in said.out


def test_help_and_version_do_not_load_the_heavy_libraries() -> None:
    """They answer at once; checked by what is imported, which does not depend on the machine."""
    said = finish(start("--help", PYTHONVERBOSE="1"))
    assert said.code == 0
    assert all(f" {verb} " in said.out for verb in VERBS)
    assert "import 'typer'" in said.err
    for name in ("torch", "transformers", "onnx", "onnxruntime", "numpy.random", "matplotlib"):
        assert f"import '{name}'" not in said.err or name == "numpy.random"
    said = finish(start("--version"))
    assert (said.code, said.out) == (0, f"edgec {__version__}\n")


def test_no_arguments_show_help(capsys: pytest.CaptureFixture[str]) -> None:
    said = invoke(capsys)
    assert said.code == 2
    assert "Usage: edgec" in said.out + said.err


def test_export_says_what_it_made(
    capsys: pytest.CaptureFixture[str],
    lm_source: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("export", lm_source, "-t", "onnx-x64", "--plan", "dense:int4-b32", "--calibration", text_file)
    said = invoke(capsys, *words)
    assert said.code == 0, said
    for part in ("tiny-llama-onnx-x64", "bits per weight", "parity with torch", "KL from dense", "next: edgec run"):
        assert part in said.out
    assert not said.err
    found = _json(invoke(capsys, *words, "--out", tmp_path / "again", "--json"))
    assert found["manifest"]["plan"]["budget"] == "dense:int4-b32"
    assert found["seconds"] > 0 < found["peak_rss_bytes"]
    assert tree(tmp_path / "again") == tree(tmp_path / "tiny-llama-onnx-x64")


@pytest.mark.slow
def test_export_in_another_process_gives_the_same_bytes(
    encoder_source: Path, encoder_artifact: Path, text_file: Path, tmp_path: Path
) -> None:
    """Another process, another hash seed, another folder to stand in, another name for the output."""
    words = ("-t", "onnx-x64", "--plan", "uniform:0.5", "--calibration", text_file, "-o", tmp_path / "elsewhere")
    said = finish(start("export", os.path.relpath(encoder_source), *words, PYTHONHASHSEED="4711"))
    assert said.code == 0, said
    assert tree(tmp_path / "elsewhere") == tree(encoder_artifact)


@pytest.mark.slow
def test_profile_plan_compress_export_one_by_one(
    capsys: pytest.CaptureFixture[str], lm_source: Path, text_file: Path, tmp_path: Path
) -> None:
    said = invoke(
        capsys,
        "profile",
        lm_source,
        "--calibration",
        text_file,
        "-o",
        tmp_path / "profile",
        "--plot",
        tmp_path / "s.svg",
    )
    assert said.code == 0, said
    assert "entanglement entropy per layer" in said.out
    assert "random" in said.out
    assert (tmp_path / "s.svg").read_text(encoding="utf-8").startswith("<?xml")
    summary = _json(invoke(capsys, "profile", lm_source, "-t", "onnx-x64", "--calibration", text_file, "--json"))
    assert {layer["name"] for layer in summary["layers"] if layer["incompressible"]} >= {
        "model.layers.0.self_attn.q_proj"
    }
    assert all(set(layer["entropy"]) == set(layer["random_entropy"]) for layer in summary["layers"])

    common = ("--calibration", text_file, "--profile", tmp_path / "profile")
    plan = tmp_path / "plan.yaml"
    said = invoke(capsys, "plan", lm_source, "-t", "onnx-x64", "-b", "3bpw-linear", *common, "-o", plan)
    assert said.code == 0, said
    assert f"wrote {plan}" in said.out
    record = _json(invoke(capsys, "plan", lm_source, "-t", "onnx-x64", "-b", "3bpw-linear", *common, "--json"))
    assert record["budget"] == "3bpw-linear"
    assert plan.read_text(encoding="utf-8").count("kind: ") == len(record["choices"]) == 16

    said = invoke(capsys, "compress", lm_source, "--plan", plan, *common, "-o", tmp_path / "compressed")
    assert said.code == 0, said
    record = _json(invoke(capsys, "compress", lm_source, "--plan", plan, *common, "-o", tmp_path / "c2", "--json"))
    assert tree(tmp_path / "c2") == tree(tmp_path / "compressed")
    assert record["plan"]["choices"]

    found = _json(
        invoke(capsys, "export", tmp_path / "compressed", "-t", "onnx-x64", "-o", tmp_path / "late", "--json")
    )
    assert found["manifest"]["sizes"]["linear_bpw"] <= 3

    for folder, kind in (("profile", "profile"), ("compressed", "compressed checkpoint")):
        assert _json(invoke(capsys, "inspect", tmp_path / folder, "--json"))["kind"] == kind
        assert kind in invoke(capsys, "inspect", tmp_path / folder).out


def test_run_generates_and_embeds(
    capsys: pytest.CaptureFixture[str], lm_artifact: Path, encoder_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = invoke(capsys, "run", lm_artifact, "The import ", "-n", "6")
    assert said.code == 0
    assert said.out.startswith("The import ")
    found = _json(invoke(capsys, "run", lm_artifact, "The import ", "-n", "6", "--json"))
    assert len(found["tokens"]) == 6
    assert found["prompt"] + found["text"] + "\n" == said.out
    sampled = ("run", lm_artifact, "x", "--sample", "--temp", "1.5", "--top-k", "50", "-n", "8", "--seed")
    first, again, other = (invoke(capsys, *sampled, seed) for seed in ("1", "1", "2"))
    assert first.code == 0 and first.out == again.out != other.out

    sentences = ["A list of names.", "[bold]A list[/] of \x1b[31mobjects."]
    vectors = np.array(_json(invoke(capsys, "run", encoder_artifact, *sentences, "--json"))["embeddings"])
    assert vectors.shape == (2, 128)
    said = invoke(capsys, "run", encoder_artifact, *sentences)
    assert "1.000" in said.out
    assert "[bold]A list[/] of �[31mobjects." in said.out
    monkeypatch.setattr("sys.stdin", StringIO("One line.\n\nAnother.\n"))
    assert np.array(_json(invoke(capsys, "run", encoder_artifact, "--json"))["embeddings"]).shape == (2, 128)
    monkeypatch.setattr("sys.stdin", StringIO(""))
    said = invoke(capsys, "run", encoder_artifact)
    assert (said.code, said.out) == (2, "")
    assert "nothing to run" in said.err


def test_inspect_an_artifact_and_a_checkpoint(
    capsys: pytest.CaptureFixture[str], lm_artifact: Path, lm_source: Path, tmp_path: Path
) -> None:
    said = invoke(capsys, "inspect", lm_artifact, "--check")
    assert said.code == 0
    for part in ("artifact for onnx-x64 (text-generation)", "quality kl", "svd", "every file matches the manifest"):
        assert part in said.out
    assert _json(invoke(capsys, "inspect", lm_artifact, "--json"))["kind"] == "artifact"
    assert _json(invoke(capsys, "inspect", lm_source, "--json"))["parameters"] == 336_512

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in lm_artifact.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "model.onnx").write_bytes(b"other")
    (copy / "tokenizer.json").unlink()
    (copy / "surplus").touch()
    (copy / "sub").mkdir()
    (copy / "sub" / "edgec.json").touch()
    (copy / "link").symlink_to("nowhere")
    said = invoke(capsys, "inspect", copy, "--check")
    assert said.code == 1
    added = "link was added; sub/edgec.json was added; surplus was added"
    assert f"tokenizer.json is missing; {added}; model.onnx was changed" in said.err
    manifest = json.loads((copy / "edgec.json").read_text(encoding="utf-8"))
    for broken in ({**manifest, "plan": {}}, {**manifest, "sizes": 3}, {"kind": "artifact"}, []):
        _check_damaged(copy, broken, invoke(capsys, "inspect", _with_manifest(copy, broken)))
    for broken in ({**manifest, "files": None}, {"kind": "artifact"}, {**manifest, "files": {"model.onnx": 5}}):
        _check_damaged(copy, broken, invoke(capsys, "inspect", _with_manifest(copy, broken), "--check"))


def _with_manifest(folder: Path, content: Any) -> Path:
    (folder / "edgec.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def _check_damaged(folder: Path, content: Any, said: Said) -> None:
    assert said.code == 1, (content, said)
    assert said.err.startswith(f"edgec: error: {folder / 'edgec.json'}: ") or "was changed" in said.err, said
    assert len(said.err.splitlines()) == 1


def test_targets(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["gguf", "gguf-adapter", "gguf-factored", "onnx-arm64", "onnx-x64"]
    assert [t["name"] for t in _json(invoke(capsys, "targets", "--json"))] == names
    assert _json(invoke(capsys, "targets", "onnx-arm64", "--json"))[0]["rank_multiple"] == 32
    assert "onnx-x64" in invoke(capsys, "targets").out
    assert "int4-b32" in invoke(capsys, "targets", "onnx-arm64").out


def test_doctor_finds_this_installation_well(capsys: pytest.CaptureFixture[str]) -> None:
    found = {entry["check"]: entry for entry in _json(invoke(capsys, "doctor", "--json"))}
    assert found["export and run"]["ok"], found
    assert found["torch"]["ok"]
    for kind in ("ssh", "adb", "browser", "qemu-arm64"):  # absent or not, each kind is told and none is a failure
        entry = found[f"device {kind}"]
        assert entry["ok"] and entry["detail"].startswith("needs " if entry["absent"] else "ready: --device ")


def test_doctor_says_what_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [
        Finding("torch", True, "2"),
        Finding("disk", False, "0.1 GB [free]"),
        Finding("device adb", True, "needs adb", optional=True),
    ]
    monkeypatch.setattr("edgec.inspection.doctor", lambda progress: findings)
    said = invoke(capsys, "doctor")
    assert said.code == 1
    assert "disk" in said.out and "fails" in said.out and "0.1 GB [free]" in said.out
    assert "absent" in said.out and "needs adb" in said.out


def test_tables_put_text_left_and_numbers_right() -> None:
    out = Console(file=StringIO(), width=60)
    shown = console.table("name", ">count", "remark")
    shown.add_row("a", "7", "x")
    shown.add_row("long name", "1234567", "longer")
    out.print(shown)
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    row = next(line for line in lines if line.strip().startswith("a "))
    assert row.index("7") == next(line for line in lines if "1234567" in line).index("7")
    assert row.index("x") == next(line for line in lines if "longer" in line).index("longer")


def test_pairs_have_no_empty_header_and_cannot_be_forged() -> None:
    out = Console(file=StringIO(), width=80)
    console.print_pairs(
        out, "[red]title", {"a_b": 0.123456, "[link]x": "[bold]\x1b[31m\nnext\u202e", "wide": "幅" * 60}
    )
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert not {"\x1b", "\u202e"} & set(text)
    assert text.count("幅") == 60
    assert "[bold]�[31m next�" in text and "[link]x" in text and "[red]title" in text
    assert "0.12346" in text
    assert all(line.strip() for line in text.splitlines())


def test_a_large_model_does_not_drown_its_figures_in_notes() -> None:
    plan = Plan("sha256:0", "onnx-x64", "4bpw", (), notes=tuple(f"layer {i} stays dense" for i in range(200)))
    manifest = {
        "sizes": {"model_bytes": 1, "dense_fp16_bytes": 4, "total_bpw": 4.0, "linear_bpw": 4.0},
        "parity": {"error": 1e-6, "shipped": 1e-2},
        "quality": {},
    }
    out = Console(file=StringIO(), width=80)
    console.print_export(out, pipeline.Exported(Path("out"), plan, manifest), {"seconds": 1.0, "peak_rss_bytes": 1e9})
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert len(text.splitlines()) < 30
    assert "layer 0 stays" in text
    assert "layer 199 stays" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--plain", "--budget", "0.5"), r"--plain fits a given --plan of a dense model without activations; give one"),
        (("--plain", "--plan", "uniform:0.5", "--profile", "p"), r"--plain fits a given --plan .* leave --profile out"),
        (("--max-loss", "1%", "--search", "anneal:1min"), r"--search anneal spends a budget; a line of loss"),
        (("--seed", "-1"), r"Invalid value for .--seed.: .* greater than or equal to 0"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    capsys: pytest.CaptureFixture[str], lm_source: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    said = invoke(capsys, "export", lm_source, "-t", "onnx-x64", "-o", tmp_path / "out", *words)
    check_failure(said, 2, message)
