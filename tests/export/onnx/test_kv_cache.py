"""A copy of an artifact with an int8 cache: what changes, what does not, and what it costs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_for_tests import invoke
from onnx import TensorProto, helper

from edgec.bench.reads import reads_of
from edgec.errors import CalibrationError, ExportError, OutputError
from edgec.export.onnx.kv_cache import Int8Cache, quantise, rewrite
from edgec.runtime import open_artifact
from edgec.runtime.ort_decoder import OrtDecoder


def quiet(stage: str, done: int, total: int) -> None: ...


@pytest.fixture(scope="module")
def made(lm_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Int8Cache]:
    out = tmp_path_factory.mktemp("int8") / "lm-int8-cache"
    return out, quantise(lm_artifact, out, progress=quiet)


def test_the_cache_is_a_quarter_and_the_weights_are_the_same_bytes(
    lm_artifact: Path, made: tuple[Path, Int8Cache]
) -> None:
    out, found = made
    assert found.bytes_after * 4 == found.bytes_before == reads_of(lm_artifact).cache_bytes
    assert reads_of(out).cache_bytes == found.bytes_after
    assert (out / "model.onnx.data").read_bytes() == (lm_artifact / "model.onnx.data").read_bytes()
    assert {c.dtype for c in OrtDecoder(out).caches} == {np.int8}


def test_it_answers_nearly_as_before_in_both_runtimes(lm_artifact: Path, made: tuple[Path, Int8Cache]) -> None:
    """Both token by token, as genai runs these graphs. At once is another order of sums on some CPUs, and where one
    last bit changes an int8 code of an activation, two runs of one graph differ as much as two caches.
    """
    out, found = made
    assert 0 <= found.kl < 5e-3 and found.top1 > 0.9 and found.tokens == 2048
    genai = open_artifact(out)
    ids = np.array(genai.encode("The statement is executed in a new namespace."))  # type: ignore[union-attr]
    before, after = OrtDecoder(lm_artifact).logits(ids, chunk=1), OrtDecoder(out).logits(ids, chunk=1)
    assert 0 < np.sqrt(np.mean((before - after) ** 2)) < 0.1 * before.std()
    np.testing.assert_allclose(genai.logits(ids), after, atol=1e-4)  # type: ignore[union-attr]
    assert list(genai.forced(list(ids), 8)) == OrtDecoder(out).greedy(ids, 8)  # type: ignore[union-attr]


def test_the_manifest_tells_and_its_hashes_hold(lm_artifact: Path, made: tuple[Path, Int8Cache]) -> None:
    out, found = made
    manifest = json.loads((out / "edgec.json").read_text())
    assert manifest["kv_cache"]["type"] == "int8" and manifest["kv_cache"]["kl"] == found.kl
    assert manifest["quality"] == {} and "kv_cache" not in json.loads((lm_artifact / "edgec.json").read_text())
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest, name


def test_what_cannot_be_done_is_refused(made: tuple[Path, Int8Cache], lm_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="quantised already"):
        quantise(made[0], tmp_path / "twice", progress=quiet)
    with pytest.raises(OutputError, match="exists"):
        quantise(lm_artifact, made[0], progress=quiet)
    (tmp_path / "short.txt").write_text("too little\n\nto calibrate\n")
    with pytest.raises(CalibrationError, match="at least 512"):
        quantise(lm_artifact, tmp_path / "little", calibration=tmp_path / "short.txt", progress=quiet)
    assert not (tmp_path / "little").exists()


def test_a_graph_whose_attention_is_another_is_refused(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph), tmp_path / "m")
    with pytest.raises(ExportError, match="no GroupQueryAttention"):
        rewrite(tmp_path / "m", {})


def test_the_verb_refuses_a_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    said = invoke(capsys, "kv-cache", tmp_path, "-o", tmp_path / "out")
    assert said.code != 0 and "--kv-cache q8_0" in said.err


def test_the_kernel_multiplies_with_the_cache_as_it_is_kept(lm_artifact: Path, made: tuple[Path, Int8Cache]) -> None:
    """What the runtime keeps, times the scales in the graph, is what it kept before, to half a step."""
    out, _ = made
    ids = np.random.default_rng(2).integers(0, 200, 30)
    steps = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(out / "model.onnx").graph.initializer}
    old, new = OrtDecoder(lm_artifact), OrtDecoder(out)
    for name in ("past_key_values.0.key", "past_key_values.0.value"):  # the first layer's input is not rounded yet
        before, after = (d._step(ids, 0, d._empty_cache())[1][name].numpy() for d in (old, new))
        step = steps[f"{name}.scale"].reshape(1, after.shape[1], 1, -1)
        assert after.dtype == np.int8
        inside = np.abs(before) <= 127 * step
        assert inside.mean() > 0.9 and (np.abs(after * step - before) <= 0.51 * step)[inside].all()
