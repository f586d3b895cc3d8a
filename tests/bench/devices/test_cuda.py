"""The GPU device on machines without a GPU: every runtime refuses, none computes on the CPU instead.

A stand-in for nvidia-smi says what a driver would. Where there is a GPU, the last test measures on it.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from models_for_tests import write_causal_lm

from edgec.bench.baselines import _torch_peer
from edgec.bench.devices import cuda, file, local, open_device
from edgec.bench.harness import BenchSettings, Contestant, run_bench
from edgec.bench.jobs import Job
from edgec.bench.worker import loader_of
from edgec.errors import BenchError, RuntimeUnavailableError, UsageError
from edgec.plan.hardware import misplaced
from edgec.runtime.ggml.tensors import Gpu
from edgec.runtime.options import RuntimeOptions, import_onnxruntime, products_elsewhere, session_options
from edgec.subprocesses import Finished

QUICK = BenchSettings(rounds=1, samples=1, warmup=0, min_sample_s=0.0, batch=2, threads=1, timeout_s=120)
here = pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvidia-smi with one GPU."""
    path = tmp_path / "bin" / "nvidia-smi"
    path.parent.mkdir()
    path.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        '*--id=0*) echo "NVIDIA Imaginary, GPU-1234, 24576 MiB, 999.1" ;;\n'
        '*) echo "No devices were found"; exit 6 ;;\nesac\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
    return path


@here
def test_without_a_driver_nothing_is_opened_and_all_that_lacks_is_told() -> None:
    with pytest.raises(BenchError, match=r"nvidia-smi is not on PATH"):
        open_device("cuda")
    missing = file("cuda").needs()
    assert any("driver" in line for line in missing)


def test_names_that_are_no_gpu() -> None:
    for bad in ("cuda:x", "cuda:-1", "cuda:0;ls", "cuda:999", "cuda:64"):
        with pytest.raises(UsageError, match="GPU number N"):
            open_device(bad)


@pytest.mark.usefixtures("driver")
def test_what_the_driver_says_is_the_machine() -> None:
    device = open_device("cuda:0")
    assert device.name == "cuda:0"
    told = device.describe()
    assert (told["processor"], told["memory"]) == ("NVIDIA Imaginary (CUDA)", "24576 MiB on the GPU")
    assert "999.1" in told["system"]
    assert misplaced("onnx-x64", " ".join(told.values()))
    assert not misplaced("gguf", " ".join(told.values()))
    with pytest.raises(BenchError, match="no such GPU"):
        open_device("cuda:1")


@pytest.mark.usefixtures("driver")
def test_the_worker_sees_that_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA numbers GPUs otherwise than nvidia-smi: the UUID is what both know."""
    seen: list[tuple[int | None, str]] = []

    def run(argv: list[str], *, stdin: bytes, env: dict[str, str], **_: object) -> Finished:
        seen.append((Job.from_json(stdin).gpu, env["CUDA_VISIBLE_DEVICES"]))
        return Finished(tuple(argv), 0, b"", b"", 0.1)

    device = open_device("cuda:0")
    monkeypatch.setattr(local, "run", run)
    device.measure(Job("x", "encoder", 1), timeout_s=1, on_line=lambda line: True)
    assert seen == [(0, "GPU-1234")]


def test_products_on_another_provider_are_found(encoder_folder: Path) -> None:
    """The CPU's own nodes stand for what a GPU leaves to it: all of them are elsewhere, none is where it was asked."""
    settings = session_options(RuntimeOptions(threads=1))
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = import_onnxruntime().InferenceSession(
        str(encoder_folder / "model.onnx"), settings, providers=["CPUExecutionProvider"]
    )
    assert products_elsewhere(session, "CPUExecutionProvider") == []
    nodes = [node.op_type for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()]
    assert products_elsewhere(session, "CUDAExecutionProvider") == sorted({n for n in nodes if "MatMul" in n})


@here
@pytest.mark.usefixtures("driver")
def test_a_row_fails_rather_than_computing_on_the_cpu(encoder_folder: Path, lm_folder: Path) -> None:
    """The same files are measured on the CPU just before, so it is the GPU that lacks."""
    for folder, why in ((encoder_folder, "onnxruntime-gpu"), (lm_folder, "onnxruntime-genai-cuda")):
        (row,) = run_bench([Contestant("a", folder)], QUICK, device=open_device("local"))
        assert row.metrics
        with pytest.raises(BenchError, match=f"nothing could be measured.*{why}"):
            run_bench([Contestant("a", folder)], QUICK, device=open_device("cuda"))


@pytest.mark.usefixtures("driver")
def test_a_gguf_is_not_measured_through_another_back_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A llama-cpp-python built for Vulkan would run it on whichever GPU is ggml's first."""
    monkeypatch.setattr(cuda, "gpus", lambda: (Gpu("Vulkan0", "Imaginary RX"),))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(BenchError, match="no CUDA back end.*--device vulkan"):
        open_device("cuda").measure(Job(str(tmp_path), "causal-lm", 1), timeout_s=1, on_line=lambda line: True)


@here
def test_torch_refuses_too(tmp_path: Path) -> None:
    (tmp_path / "peer").mkdir()
    _torch_peer.build(write_causal_lm(tmp_path / "lm"), tmp_path / "peer", compiled=False, dtype="float16")
    with pytest.raises(RuntimeUnavailableError, match="torch has 0 CUDA GPUs"):
        loader_of(tmp_path / "peer").load(tmp_path / "peer", RuntimeOptions(gpu=0))
    with pytest.raises(UsageError, match="named by its number"):
        RuntimeOptions(gpu=-1)


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU and a torch that has it")
def test_a_gpu_is_measured(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this torch was built without CUDA")
    (tmp_path / "peer").mkdir()
    _torch_peer.build(write_causal_lm(tmp_path / "lm"), tmp_path / "peer", compiled=False, dtype="float16")
    (row,) = run_bench([Contestant("a", tmp_path / "peer", "causal-lm")], QUICK, device=open_device("cuda"))
    assert row.metrics["decode_tok_s"].value > 0
