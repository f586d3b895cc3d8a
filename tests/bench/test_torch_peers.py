"""torch as a contestant: the same worker, the same questions, the checkpoint's own answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from models_for_tests import write_causal_lm, write_encoder

from edgec.bench import worker
from edgec.bench.baselines import _torch_peer, make, require
from edgec.bench.jobs import Answers, Job
from edgec.bench.loaders import torch_models
from edgec.bench.sizes import artifact_bytes
from edgec.errors import BenchError, CheckpointError, EdgecError, RuntimeUnavailableError
from edgec.runtime.options import RuntimeOptions

ONE = RuntimeOptions(threads=1)


def peer(source: Path, out: Path, *, compiled: bool = False, dtype: str = "float32") -> Path:
    out.mkdir()
    _torch_peer.build(source, out, compiled=compiled, dtype=dtype)
    return out


def answers_of(job: Job) -> Answers:
    found = Answers()

    def say(event: str, **values: object) -> None:
        assert found.take(json.dumps({"event": event, **values}).encode(), job), found.problem

    worker.measure(job, say)
    return found


def test_a_causal_lm_is_measured_in_torch_and_continues_as_it_should(tmp_path: Path) -> None:
    source = write_causal_lm(tmp_path / "lm")
    folder = make("torch-eager", "causal-lm", source, tmp_path / "peer")
    model = torch_models.load(folder, ONE)
    assert isinstance(model, torch_models.TorchCausalLM)
    ids = [5, 6, 7, 8]
    forced = list(model.forced(ids, 4))
    logits = model.logits(np.array(ids + forced))
    logits[:, 2] = -np.inf  # end of text
    assert forced == [int(row.argmax()) for row in logits[3:7]]
    job = Job(str(folder), "causal-lm", threads=1, samples=1, min_sample_s=0.0, prompt_tokens=8, new_tokens=4)
    found = answers_of(job)
    assert found.done and "torch" in found.facts
    assert {"ttft_ms", "prefill_tok_s", "decode_tok_s"} <= set(found.samples[0])
    (source / "consolidated.safetensors").write_bytes(bytes(1000))  # beside it in some repositories, never loaded
    assert artifact_bytes(folder) == (source / "model.safetensors").stat().st_size


def test_an_encoder_is_measured_in_torch_and_embeds_alike_in_half_the_bits(tmp_path: Path) -> None:
    source = write_encoder(tmp_path / "encoder")
    full, half = (
        torch_models.load(peer(source, tmp_path / dtype, dtype=dtype), ONE) for dtype in ("float32", "bfloat16")
    )
    assert isinstance(full, torch_models.TorchEncoder) and isinstance(half, torch_models.TorchEncoder)
    texts = ["the model", "a module of the library that is imported"]
    a, b = full.embed(texts), half.embed(texts)
    assert np.allclose(np.linalg.norm(a, axis=1), 1)
    assert ((a * b).sum(1) > 0.99).all() and not np.array_equal(a, b)
    found = answers_of(
        Job(str(tmp_path / "float32"), "encoder", 1, samples=1, min_sample_s=0.0, sentences=("the model", "a library"))
    )
    assert found.done and {"items_s", "item_ms"} <= set(found.samples[0])


def test_without_a_compiler_the_row_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeUnavailableError, match=r"torch-compile .*needs a C\+\+ compiler"):
        require("torch-compile", "encoder")
    assert require("torch-eager", "encoder")


def test_what_names_no_loader_or_no_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "peer"
    folder.mkdir()
    job = Job(str(folder), "encoder", threads=1, sentences=("a",))
    for told, error, why in (
        ({"loader": "../torch_models"}, EdgecError, "unknown loaders plugin"),
        ({"loader": "torch_models"}, CheckpointError, "expected checkpoint, compile and dtype"),
        ({"loader": "torch_models", "checkpoint": "/", "compile": True, "dtype": "int1"}, CheckpointError, "float32"),
    ):
        (folder / "peer.json").write_text(json.dumps(told))
        with pytest.raises(error, match=why):
            worker.measure(job, lambda *_, **__: None)
    with pytest.raises(BenchError, match="another tool reads the checkpoint"):
        artifact_bytes(folder)
