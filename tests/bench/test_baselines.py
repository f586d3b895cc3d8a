"""Dense peers by other people's tools: each loads, is what it says, and appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import artifacts_for_tests as artifacts
import numpy as np
import onnx
import pytest

from edgec.bench.baselines import SOURCES, all_baselines, make, names
from edgec.bench.sizes import artifact_bytes, model_file
from edgec.errors import BenchError, CheckpointError, OutputError, UsageError
from edgec.runtime.ort_encoder import OrtEncoder

SENTENCES = ["the cat sat", "a dog", "the model of text"]


def test_every_baseline_states_its_task_name_tool_and_source() -> None:
    found = all_baselines()
    pairs = [(task, b.NAME) for b in found for task in b.TASKS]
    assert len(set(pairs)) == len(pairs)
    assert {task for task, _ in pairs} == {"encoder", "causal-lm"}
    assert all(b.TOOL and b.SOURCE in SOURCES for b in found)
    assert set(names("encoder")) >= {"int8", "int4"} and set(names("causal-lm")) >= {"fp32", "int4"}


@pytest.mark.parametrize(("name", "operator"), [("int8", "MatMulInteger"), ("int4", "MatMulNBits")])
def test_encoder_baselines_are_quantised_and_agree(tmp_path: Path, name: str, operator: str) -> None:
    dense = artifacts.encoder(tmp_path / "dense", pooled=True)
    folder = make(name, "encoder", dense, tmp_path / name)
    assert operator in {n.op_type for n in onnx.load(folder / "model.onnx").graph.node}
    a, b = (OrtEncoder(f).embed(SENTENCES) for f in (dense, folder))
    assert (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1) == pytest.approx(1, abs=0.02)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", name]


def test_the_builders_folder_counts_its_external_data(lm_folder: Path) -> None:
    parts = [lm_folder / "model.onnx", lm_folder / "model.onnx.data"]
    assert artifact_bytes(lm_folder) == sum(p.stat().st_size for p in parts)
    assert model_file(lm_folder) == parts[0]


def test_what_cannot_be_built_leaves_nothing_behind(tmp_path: Path) -> None:
    dense = artifacts.encoder(tmp_path / "dense", pooled=True)
    (dense / "model.onnx").write_bytes(b"broken")
    with pytest.raises(BenchError, match=r"int8 .*quantize_dynamic.* failed: exit status 1"):
        make("int8", "encoder", dense, tmp_path / "out")
    with pytest.raises(BenchError, match="not a folder"):
        make("int8", "encoder", tmp_path / "gone", tmp_path / "out")
    with pytest.raises(OutputError, match="already exists"):
        make("int8", "encoder", dense, dense)
    with pytest.raises(UsageError, match=r"known: .*int8"):
        make("int3", "encoder", dense, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_external_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = artifacts.encoder(tmp_path / "dense", pooled=True)
    model = onnx.load(folder / "model.onnx")
    tensor = model.graph.initializer[0]
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "../secret", "offset": "0", "length": str(size)}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "secret").write_bytes(b"0" * size)
    with pytest.raises(CheckpointError, match="outside"):
        artifact_bytes(folder)


def test_a_folder_without_a_model_or_with_a_broken_one_has_no_size(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no model file"):
        artifact_bytes(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 10)
    with pytest.raises(BenchError, match="cannot be read as ONNX"):
        artifact_bytes(tmp_path)
