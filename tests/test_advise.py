"""`edgec advise` on tiny models: the whole decision, its refusals, and bench rows instead of estimates.

Kernel rates are given, because a test machine is busy; `tests/bench/test_kernels.py` measures them. Profiles have
made-up losses: scoring every kind takes minutes, and the decision does not depend on where losses come from.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_for_tests import check_failure, invoke

from edgec import advise
from edgec.bench import kernels, kernels_ggml
from edgec.bench.kernels import KernelRate, RuntimeRates
from edgec.errors import UsageError
from edgec.plan.planner import make_choice
from edgec.profile.activations import Statistics
from edgec.profile.store import Profile, save_profile
from edgec.quantize.formats import CoreFormat
from edgec.records import LayerProfile, Spec
from edgec.workspace import Workspace

RAM = 60_000_000


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(
        task: str, formats: Any, shape: Any, weights: int, rows: int, write: Any, threads: int = 0
    ) -> RuntimeRates:
        made = {name: KernelRate(name, rows, threads or 1, 0.05 * rows, 1.5, 10.0) for name in formats}
        return RuntimeRates(40_000_000, 15_000_000, 0.0, made)

    monkeypatch.setattr(kernels, "measure", measure)


def _profile(source: Path, out: Path) -> Path:
    """A profile of dense and low-rank forms with made-up losses that fall with bits and with parameters kept."""
    workspace = Workspace(source)
    found = []
    for layer in workspace.layers:
        specs = [Spec("dense"), *([Spec("svd", (32,))] if layer.role == "linear" else [])]
        forms = [make_choice(layer, s, CoreFormat.parse(f)) for s in specs for f in ("int8-b32", "int4-b32")]
        losses = [1e-3 * (c.format[3] == "4") + 0.01 * (c.spec.kind != "dense") for c in forms]
        scored = tuple(replace(c, error=0.1, loss=loss) for c, loss in zip(forms, losses, strict=True))
        found.append(LayerProfile(layer.name, layer.role, layer.shape, {}, {}, (), False, layer.tied_to, scored))
    statistics = Statistics({}, {}, 1)
    save_profile(Profile(workspace.checkpoint.fingerprint, "made up", 1, tuple(found), statistics), out)
    return out


def _bench_file(path: Path, system: str = "Linux 6 (x86_64)", **changes: Any) -> Path:
    def spread(value: float) -> dict[str, float]:
        return {"value": value, "low": value, "high": value, "n": 3}

    row = {
        "contestant": "dense int8",
        "device": "local",
        "task": "encoder",
        "settings": {"batch": 4},
        "metrics": {"item_ms": spread(2.5), "peak_rss_bytes": spread(58e6)},
        "artifact_bytes": 400_000,
        "quality": {"cosine": 0.999},
    }
    path.write_text(json.dumps({"machine": {"system": system}, "measurements": [row | changes]}), encoding="utf-8")
    return path


@pytest.mark.usefixtures("rates")
def test_an_encoder_with_bench_rows(
    capsys: pytest.CaptureFixture[str], encoder_source: Path, text_file: Path, tmp_path: Path
) -> None:
    encoder_profile = _profile(encoder_source, tmp_path / "profile")
    words = ["advise", encoder_source, "--target", "onnx-x64", "--ram", f"{RAM // 1000}KB", "--latency", "30ms"]
    words += ["--profile", encoder_profile, "--calibration", text_file, "--smaller", encoder_source]
    said = invoke(capsys, *words, "--json", "--measured", _bench_file(tmp_path / "bench.json"))
    assert (said.code, said.err) == (0, ""), said
    body = json.loads(said.out)
    assert body["cache"]["decision"] is None
    rows = {a["name"]: a for a in body["budget"]["alternatives"]}
    assert rows["dense int8 (bench)"]["loss"] == pytest.approx(0.001)
    assert (rows["dense int8 (bench)"]["ram"]["total"], rows["dense int8 (bench)"]["ms"]) == (58e6, 2.5)
    assert rows["dense int8 (bench)"]["viable"]
    whole = rows["dense fp32"]
    parts = ("runtime", "weights", "extra", "kv", "activations")
    assert whole["ram"]["total"] == pytest.approx(sum(whole["ram"][part] for part in parts))
    (small,) = (a for a in rows.values() if a["what"] == "smaller model")
    assert small["loss"] is None
    assert body["verdict"]["decision"] in ("deploy", "go back", "buy smaller")
    shown = invoke(capsys, *words)
    assert shown.code == 0
    assert max(map(len, (n for n in shown.out.splitlines() if "─" in n))) <= 100
    for part in ("functional error", "quantization by hardware", "no KV cache", "memory and time", "VERDICT: "):
        assert part in shown.out


@pytest.mark.usefixtures("rates")
def test_a_causal_lm_shows_its_cache_and_weighs_a_smaller_one_by_text(
    capsys: pytest.CaptureFixture[str], lm_source: Path, text_file: Path, tmp_path: Path
) -> None:
    words = ["advise", lm_source, "--target", "onnx-x64", "--ram", "1GB", "--calibration", text_file]
    words += ["--context", "64", "--profile", _profile(lm_source, tmp_path / "profile")]
    said = invoke(capsys, *words, "--batch", "2", "--smaller", lm_source, "--json")
    assert (said.code, said.err) == (0, ""), said
    body = json.loads(said.out)
    assert body["cache"]["decision"]["bytes"] == 2 * 2 * 64 * 2 * 2 * 32 * 4
    assert body["facts"]["batch"] == 2
    # The same model is as good as itself, so at a loss of 0 the tie goes to it: the smaller one fits at int8.
    assert body["verdict"]["decision"] == "buy smaller"
    assert any("bits per byte" in n for n in body["verdict"]["numbers"])


def test_a_gguf_file_is_judged_by_ggmls_kernels(
    capsys: pytest.CaptureFixture[str],
    lm_source: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its cache is F16, its floats stay F16 in memory, and llama.cpp keeps packed weights twice."""
    pytest.importorskip("llama_cpp")
    told: list[bool] = []

    def measure(formats: Any, shape: Any, rows: int, *, mapped: bool, threads: int = 0) -> RuntimeRates:
        told.append(mapped)
        made = {name: KernelRate(name, rows, threads or 1, 0.05, 1.0 + mapped, 10.0) for name in formats}
        return RuntimeRates(40_000_000, 0, 0.0, made)

    monkeypatch.setattr(kernels_ggml, "measure", measure)
    words = ["advise", lm_source, "--ram", "1GB", "--calibration", text_file, "--context", "64", "--latency", "30ms"]
    words += ["--profile", _profile(lm_source, tmp_path / "profile")]
    totals = []
    for target in ("gguf", "gguf-factored"):
        said = invoke(capsys, *words, "--target", target, "--json")
        assert (said.code, said.err) == (0, ""), said
        body = json.loads(said.out)
        assert body["quantization"]["hardware"]["name"] == "ggml-cpu"
        assert body["cache"]["decision"]["precision"] == "fp16"
        (row,) = (a for a in body["budget"]["alternatives"] if a["name"] == "dense int4-b32")
        assert row["fits_latency"] is True  # ggml's kernels are timed here, whatever the processor
        totals.append(row["ram"]["total"])
    assert told == [True, False]
    assert totals[0] > totals[1]
    shown = invoke(capsys, *words, "--target", "gguf")
    assert shown.code == 0
    assert "Q4_K" in shown.out


@pytest.mark.usefixtures("rates")
def test_encoders_are_no_gguf(capsys: pytest.CaptureFixture[str], encoder_source: Path) -> None:
    start = ["advise", encoder_source, "--target", "gguf", "--ram", "1GB"]
    check_failure(invoke(capsys, *start), 1, "use an ONNX target")


def test_sizes_times_and_losses_as_people_type_them() -> None:
    assert (advise.parse_ram("2GB"), advise.parse_ram("1.5GiB")) == (2e9, 1.5 * 2**30)
    assert advise.parse_loss("2%", "feature-extraction") == pytest.approx(0.02)
    assert advise.parse_loss("1%", "text-generation") == pytest.approx(0.00995, abs=1e-5)
    for text in ("2", "0.3", "4bpw", "GB", "-1GB", "0MB"):
        with pytest.raises(UsageError, match=r"--ram .*512MB, 2GB"):
            advise.parse_ram(text)
    for text in ("1", "0%", "101%", "x"):
        with pytest.raises(UsageError, match=r"--max-loss .*1% or 2\.5%"):
            advise.parse_loss(text, "feature-extraction")


def test_what_cannot_be_judged_is_refused(
    capsys: pytest.CaptureFixture[str], encoder_source: Path, lm_source: Path, tmp_path: Path
) -> None:
    start = ["advise", encoder_source, "--target", "onnx-x64", "--ram", "1GB"]
    check_failure(invoke(capsys, *start, "--smaller", lm_source), 2, "--smaller .* does text-generation, MODEL does")
    check_failure(invoke(capsys, *start, "--context", "65"), 2, r"--context 65: .* takes 1 … 64 tokens")
    other = _bench_file(tmp_path / "arm.json", system="Linux 6 (aarch64)")
    check_failure(invoke(capsys, *start, "--measured", other), 2, "--measured .*arm.json: measured on linux 6")
    wrong = _bench_file(tmp_path / "lm.json", task="causal-lm")
    check_failure(invoke(capsys, *start, "--measured", wrong), 2, "--measured .*'dense int8' is a causal-lm")
    for device in ("cuda:0", "vulkan:0"):
        other = _bench_file(tmp_path / "gpu.json", device=device)
        check_failure(invoke(capsys, *start, "--measured", other), 2, "--measured .*'dense int8' was measured on a GPU")
    bad = _bench_file(tmp_path / "bad.json", metrics={"item_ms": {"value": -1.0}})
    check_failure(invoke(capsys, *start, "--measured", bad), 2, "--measured .*no measure")
    for fields in ({"quality": None}, {"settings": []}):
        odd = _bench_file(tmp_path / "odd.json", **fields)
        check_failure(invoke(capsys, *start, "--measured", odd), 2, "--measured .*not what `edgec bench")
    for fields in ({"quality": {"cosine": None}}, {"quality": {"cosine": "0.9"}}, {"artifact_bytes": -1}):
        odd = _bench_file(tmp_path / "odd.json", **fields)
        check_failure(invoke(capsys, *start, "--measured", odd), 2, "--measured .*no measure")
    (tmp_path / "no.json").write_text('{"x": 1}', encoding="utf-8")
    check_failure(invoke(capsys, *start, "--measured", tmp_path / "no.json"), 2, "--measured .*not what `edgec bench")
