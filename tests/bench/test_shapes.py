"""Random-weight models: real dimensions, the same bytes for the same seed, loadable by the usual tools."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgec.bench import shapes
from edgec.errors import OutputError, UsageError


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_the_one_billion_shape_has_the_real_models_dimensions() -> None:
    shape = shapes.get("llama-3.2-1b")
    assert shape.parameters() == 1_235_814_400
    config = shape.config()
    assert config["rope_scaling"]["factor"] == 32.0 and config["rope_theta"] == 500000.0
    assert config["tie_word_embeddings"] is True and config["vocab_size"] == 128256
    assert 2.5e8 < shapes.get("llama-300m").parameters() < 3.5e8


def test_a_written_shape_is_sharded_deterministic_and_normal(tmp_path: Path) -> None:
    a = shapes.write("llama-tiny", tmp_path / "a", shard_bytes=150_000)
    b = shapes.write("llama-tiny", tmp_path / "b", shard_bytes=150_000)
    c = shapes.write("llama-tiny", tmp_path / "c", seed=1, shard_bytes=150_000)
    assert digest(a) == digest(b) != digest(c)
    index = json.loads((a / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {name for name, _ in shapes.get("llama-tiny").tensors()}
    assert len(set(index["weight_map"].values())) > 1
    shard = load_file(a / index["weight_map"]["model.layers.1.mlp.up_proj.weight"])
    weight = shard["model.layers.1.mlp.up_proj.weight"]
    assert weight.dtype == np.float16 and weight.astype(np.float32).std() == pytest.approx(0.02, rel=0.02)


def test_transformers_loads_it(tmp_path: Path) -> None:
    folder = shapes.write(shapes.with_layers(shapes.get("llama-tiny"), 1), tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == shapes.with_layers(shapes.get("llama-tiny"), 1).parameters()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("the cat, été").input_ids) == "the cat, été"


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"known: .*llama-3\.2-1b"):
        shapes.write("llama-9000b", tmp_path / "m")
    with pytest.raises(OutputError, match="already exists"):
        shapes.write("llama-tiny", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        shapes.write("llama-tiny", tmp_path / "file" / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
