"""Devices with the real thing behind them; each skips, with the reason, where that is not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgec.bench.devices import Device, file, open_device
from edgec.bench.harness import BenchSettings, Contestant, run_bench
from runtime_tests.arm64.root import Arm64Root

SMALL = BenchSettings(
    rounds=1, samples=1, warmup=1, min_sample_s=0.0, batch=4, prompt_tokens=8, new_tokens=4, timeout_s=600
)


@pytest.mark.parametrize("artifact", ["minilm_arm64_artifact", "stories_arm64_fp32"])
def test_the_worker_runs_on_emulated_arm64(
    arm64_root: Arm64Root, artifact: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(artifact)
    (row,) = run_bench([Contestant("a", folder)], SMALL, device=open_device(f"qemu-arm64:{arm64_root.path}"))
    assert row.metrics["peak_rss_bytes"].value > row.metrics["runtime_rss_bytes"].value > 0
    assert not {"ttft_ms", "decode_tok_s", "items_s", "load_s"} & set(row.metrics)
    assert any(note.startswith("aarch64 and x86_64 agree") for note in row.notes)
    assert any("MatMul" in note for note in row.notes)
    assert not any(note.startswith(("failed", "incomplete")) for note in row.notes)


@pytest.fixture
def browser() -> Device:
    """Chromium with an installed onnxruntime-web; skips where one is missing."""
    if missing := file("browser").needs():
        pytest.skip("; ".join(missing))
    return open_device("browser")


@pytest.mark.parametrize(
    "artifact", ["minilm_arm64_artifact", "minilm_arm64_factored", "stories_arm64_artifact", "stories_arm64_fp32"]
)
def test_a_page_runs_what_was_exported(browser: Device, artifact: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(artifact)
    settings = replace(SMALL, threads=2, timeout_s=120)
    (row,) = run_bench([Contestant("a", folder)], settings, device=browser)
    rate = "items_s" if "minilm" in artifact else "decode_tok_s"
    assert row.metrics[rate].value > 0 and row.metrics["load_s"].value > 0
    assert row.metrics["peak_rss_bytes"].value > row.metrics["runtime_rss_bytes"].value > 0
    assert any(note.startswith("WebAssembly and x86_64 agree") for note in row.notes)
    assert not any(note.startswith(("failed", "incomplete")) for note in row.notes)
