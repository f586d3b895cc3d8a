"""GPUs through ggml's Vulkan back end: which one a name means, what it runs, and what its rows say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp")

from edgec import random_gguf
from edgec.bench import shapes
from edgec.bench.devices import file, local, open_device, vulkan
from edgec.bench.harness import BenchSettings, Contestant, run_bench
from edgec.bench.jobs import Job
from edgec.errors import BenchError, UsageError
from edgec.runtime.ggml.tensors import Gpu
from edgec.subprocesses import Finished

QUICK = BenchSettings(rounds=1, samples=1, warmup=0, min_sample_s=0.0, threads=1, timeout_s=300, new_tokens=4)
CARD, OTHER = Gpu("Vulkan0", "Imaginary RX"), Gpu("CUDA0", "Imaginary GTX")
SOFTWARE = Gpu("Vulkan1", "llvmpipe (LLVM 19)")


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda *found: monkeypatch.setattr(vulkan, "gpus", lambda: found)


def test_names_that_are_no_gpu() -> None:
    for bad in ("vulkan:x", "vulkan:-1", "vulkan:0;ls", "vulkan:999", "vulkan:64"):
        with pytest.raises(UsageError, match="GPU number N"):
            open_device(bad)


def test_only_what_vulkan_drives_is_numbered(listed: Callable[..., None]) -> None:
    listed(OTHER, CARD)
    device = open_device("vulkan")
    assert device.describe()["processor"] == "Imaginary RX (Vulkan)"
    assert not any("software" in note for note in device.notes)
    assert file("vulkan").needs() == ()
    with pytest.raises(BenchError, match=r"no such GPU \(Imaginary RX\).*GGML_VULKAN"):
        open_device("vulkan:1")


def test_the_worker_is_told_the_number_among_all_of_ggmls_gpus(
    listed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[int | None] = []

    def run(argv: list[str], *, stdin: bytes, **_: Any) -> Finished:
        seen.append(Job.from_json(stdin).gpu)
        return Finished(tuple(argv), 0, b"", b"", 0.1)

    monkeypatch.setattr(local, "run", run)
    listed(OTHER, CARD)
    (tmp_path / "model.gguf").touch()
    open_device("vulkan").measure(Job(str(tmp_path), "causal-lm", 1), timeout_s=1, on_line=lambda line: True)
    assert seen == [1]


def test_other_runtimes_artifacts_fail_their_row(listed: Callable[..., None], tmp_path: Path) -> None:
    """onnxruntime would take the number for one of CUDA's."""
    listed(CARD)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(BenchError, match="runs GGUF artifacts"):
        open_device("vulkan").measure(Job(str(tmp_path), "encoder", 1), timeout_s=1, on_line=lambda line: True)


def test_a_software_driver_is_told(listed: Callable[..., None]) -> None:
    listed(SOFTWARE)
    assert any("software driver" in note for note in open_device("vulkan").notes)


def test_without_a_gpu_it_says_what_to_build(listed: Callable[..., None]) -> None:
    listed()
    with pytest.raises(BenchError, match=r"\(none\); it needs a llama-cpp-python with Vulkan"):
        open_device("vulkan")
    assert "a GPU with a Vulkan driver" in file("vulkan").needs()[0]


@pytest.mark.skipif(bool(file("vulkan").needs()), reason="no GPU that ggml reaches by Vulkan")
def test_a_gpu_is_measured(tmp_path: Path) -> None:
    model = shapes.write("llama-tiny", tmp_path / "model")
    folder = random_gguf.write_factored(model, "uniform:0.5", tmp_path / "factored")
    (row,) = run_bench([Contestant("a", folder)], QUICK, device=open_device("vulkan"))
    assert row.metrics["decode_tok_s"].value > 0 and row.device == "vulkan:0"
