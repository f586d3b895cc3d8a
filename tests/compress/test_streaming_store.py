"""The folder that is written while it is fitted equals the one that is written at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgec import modeling
from edgec.checkpoint import Checkpoint, open_checkpoint
from edgec.compress.apply import fit_choices
from edgec.compress.store import is_compressed, open_compressed, read_factors, save_compressed
from edgec.compress.streaming_store import streamed_folder
from edgec.errors import OutputError, PlanError
from edgec.export.targets import get_target
from edgec.fit import Factors
from edgec.plan.files import write_plan
from edgec.plan.planner import constrained_plan
from edgec.records import Plan


def fitted(folder: Path, text: str) -> tuple[Checkpoint, Plan, dict[str, Factors]]:
    checkpoint = open_checkpoint(folder)
    model = modeling.load_dense(checkpoint)
    layers = modeling.layers(model)
    plan = constrained_plan(text, layers, get_target("onnx-x64"), checkpoint.fingerprint)
    factors = fit_choices(
        plan.choices, lambda name: model.get_parameter(f"{name}.weight").numpy(), layers, lambda name: None
    )
    return checkpoint, plan, factors


@pytest.mark.parametrize("shard_bytes", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("text", ["uniform:0.5:int4-b32", "dense:int8-b32", "dense:fp32"])
def test_same_tensors_same_config(text: str, shard_bytes: int, lm_source: Path, tmp_path: Path) -> None:
    checkpoint, plan, factors = fitted(lm_source, text)
    save_compressed(checkpoint, plan, factors, write_plan(plan), tmp_path / "whole")
    out = tmp_path / "streamed"
    tied = {"lm_head", "model.embed_tokens"}
    with streamed_folder(checkpoint, plan, write_plan(plan), out, shard_bytes=shard_bytes) as writer:
        for name in sorted(set(factors) - tied):
            writer.add({name: factors[name]})
        writer.add({name: factors[name] for name in sorted(tied)})
    whole, streamed = open_checkpoint(tmp_path / "whole"), open_checkpoint(out)
    assert streamed.fingerprint == whole.fingerprint  # of the config and every tensor's name, type, shape and bytes
    assert is_compressed(out)
    for name, found in read_factors(open_compressed(out)).items():
        np.testing.assert_array_equal(found.dense(), factors[name].dense())
    others = {p.name for p in (tmp_path / "whole").iterdir()} - {"model.safetensors"}
    assert others == {p.name for p in out.iterdir() if not p.name.startswith("model")}
    for name in others:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_shards_are_named_and_indexed_as_transformers_does(lm_source: Path, tmp_path: Path) -> None:
    checkpoint, plan, factors = fitted(lm_source, "uniform:0.5:int4-b32")
    out, limit = tmp_path / "out", 50_000
    with streamed_folder(checkpoint, plan, write_plan(plan), out, shard_bytes=limit) as writer:
        writer.add(factors)
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = open_checkpoint(out)
    assert {name: info.file.name for name, info in found.tensors.items()} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(i.stop - i.start for i in found.tensors.values())
    for file in files:
        sizes = [i.stop - i.start for i in found.tensors.values() if i.file.name == file]
        assert sum(sizes) <= limit or len(sizes) == 1


def test_whole_or_not_at_all(lm_source: Path, tmp_path: Path) -> None:
    checkpoint, plan, factors = fitted(lm_source, "dense:int8-b32")
    out = tmp_path / "out"
    with (
        pytest.raises(PlanError, match=r"layers of the plan were not fitted, first 'lm_head'"),
        streamed_folder(checkpoint, plan, write_plan(plan), out, shard_bytes=1) as writer,
    ):
        writer.add({name: factors[name] for name in factors if name not in {"lm_head", "model.embed_tokens"}})
    with (
        pytest.raises(PlanError, match="is already written"),
        streamed_folder(checkpoint, plan, write_plan(plan), out, shard_bytes=1) as writer,
    ):
        writer.add(factors)
        writer.add(factors)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    with (
        pytest.raises(OutputError, match="already exists"),
        streamed_folder(checkpoint, plan, write_plan(plan), out),
    ):
        pass
