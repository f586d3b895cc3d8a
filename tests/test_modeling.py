"""Configurations that lie, tensors that are missing or too many, and the layers of a model that a plan may replace."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from optimum.utils import NormalizedConfigManager
from safetensors.numpy import load_file, save_file

from edgec import modeling
from edgec.checkpoint import Checkpoint, open_checkpoint
from edgec.errors import CheckpointError, EdgecError, UnsupportedModelError
from edgec.modeling import DECODER_TASK, ENCODER_TASK, dimensions, hf_config, layers, load_dense, skeleton, task_of


def copied(source: Path, folder: Path, **changes: Any) -> Checkpoint:
    """The checkpoint with another config.json; `...` drops a key."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def with_tensors(source: Path, folder: Path, change: Any) -> Checkpoint:
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    tensors = {name: array.copy() for name, array in load_file(file).items()}
    file.unlink()
    change(tensors)
    save_file(tensors, file)
    return open_checkpoint(folder)


def test_task_and_dimensions(encoder_source: Path, lm_source: Path) -> None:
    encoder, lm = open_checkpoint(encoder_source), open_checkpoint(lm_source)
    assert (task_of(encoder), task_of(lm)) == (ENCODER_TASK, DECODER_TASK)
    for checkpoint in (encoder, lm):
        found, config = dimensions(checkpoint), checkpoint.config
        assert found.layers == config["num_hidden_layers"]
        assert found.hidden == config["hidden_size"]
        assert found.heads == config["num_attention_heads"]
        assert found.kv_heads == config.get("num_key_value_heads", found.heads)
        assert found.head_dim * found.heads == found.hidden
        assert found.vocabulary == config["vocab_size"]


@pytest.mark.parametrize("kind", sorted(modeling._NORMALIZED_FALLBACK))
def test_the_fallback_knows_what_optimum_lacks(kind: str, tmp_path: Path) -> None:
    with pytest.raises(KeyError):  # the day optimum has it, the entry goes
        NormalizedConfigManager.get_normalized_config_class(kind)
    config = transformers.AutoConfig.for_model(kind)
    checkpoint = Checkpoint(tmp_path, {**config.to_dict(), "model_type": kind, "architectures": ["X"]}, {})
    found = dimensions(checkpoint)
    assert found.layers == config.num_hidden_layers
    assert found.vocabulary == config.vocab_size


@pytest.mark.parametrize("which", ["encoder_source", "lm_source"])
@pytest.mark.parametrize(
    "change",
    [
        {key: value}
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
        for value in (0, -1, None, "evil", 1.5, [1], {}, 10**9, 2**70)
    ]
    + [
        {"max_position_embeddings": -1},
        {"max_position_embeddings": 2**70},
        {"hidden_size": 129},
        {"num_attention_heads": 5},
        {"num_key_value_heads": -2},
        {"head_dim": "x"},
        {"hidden_act": "evil"},
        {"dtype": "evil"},
        {"architectures": ["GPT2LMHeadModel"]},
        {"model_type": "gpt2"},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"vocab_size": 63},
    ],
    ids=lambda change: " ".join(f"{k}={v}" for k, v in change.items())[:40],
)
def test_a_config_that_lies_is_refused_before_anything_is_allocated(
    which: str, change: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint = copied(request.getfixturevalue(which), tmp_path / "m", **change)
    if which == "encoder_source" and set(change) & {"num_key_value_heads", "head_dim"}:
        return  # BERT has neither
    with pytest.raises(EdgecError) as caught:
        skeleton(checkpoint)
    assert "\n" not in str(caught.value)


def test_unknown_architectures_are_named(encoder_source: Path, tmp_path: Path) -> None:
    for number, (change, match) in enumerate(
        [
            ({"model_type": "nope"}, "unknown architecture 'nope'"),
            ({"architectures": ["NopeModel"]}, "unknown architecture 'NopeModel'"),
            ({"architectures": ["__class__"]}, "unknown architecture"),
            ({"architectures": ["AutoModel"]}, "unknown architecture 'AutoModel'"),
            ({"architectures": ["os.system"]}, "unknown architecture"),
            ({"quantization_config": {"bits": 4}}, "already quantised"),
        ]
    ):
        with pytest.raises(UnsupportedModelError, match=match):
            skeleton(copied(encoder_source, tmp_path / str(number), **change))
    with pytest.raises(UnsupportedModelError, match="save_pretrained"):
        task_of(copied(encoder_source, tmp_path / "head", architectures=["BertForMaskedLM"]))


@pytest.mark.parametrize("which", ["encoder_source", "lm_source"])
def test_nothing_that_a_config_names_is_loaded(
    which: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = request.getfixturevalue(which)
    evil = copied(
        source,
        tmp_path / "evil",
        auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Config"},
        attn_implementation="evil/kernel",
        _attn_implementation="evil/kernel",
        transformers_weights="evil.safetensors",
        nested={"attn_implementation": "evil/kernel"},
    )
    (evil.folder / "evil.py").write_text("raise SystemExit('executed')")
    shutil.copy(source / "model.safetensors", evil.folder / "evil.safetensors")
    # Other tests run tools that turn logging down for the whole process; the warning is asked for by name.
    monkeypatch.setattr(logging.getLogger("edgec.modeling"), "disabled", False)
    monkeypatch.setattr(logging.getLogger("edgec.modeling"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("edgec"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="edgec.modeling"):
        model = load_dense(evil)
    assert "auto_map" in caplog.text
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert "evil" not in json.dumps(hf_config(evil).to_dict())
    for name, parameter in load_dense(open_checkpoint(source)).named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def test_tensors_of_another_shape_missing_or_too_many(encoder_source: Path, tmp_path: Path) -> None:
    name = "encoder.layer.1.output.dense.weight"

    def refused(change: Any, match: str, folder: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            skeleton(with_tensors(encoder_source, tmp_path / folder, change))

    refused(lambda t: t.pop(name), f"1 tensors are missing, first '{name}'", "missing")
    refused(lambda t: t.update({name: t[name].T.copy()}), rf"{name}' is \[256, 128\], config.json makes it", "turned")
    refused(lambda t: t.update({f"bert.{name}": t[name]}), "are the same weight", "twice")
    refused(
        lambda t: t.update({name.replace(".1.", ".7."): t[name]}), "in a block that config.json does not count", "deep"
    )
    stray = with_tensors(
        encoder_source,
        tmp_path / "stray",
        lambda t: t.update({"../../evil": np.ones(2, np.float32), "pooler.x": t[name]}),
    )
    skeleton(stray)


def test_old_names_and_prefixes_are_understood(encoder_source: Path, tmp_path: Path) -> None:
    def age(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[f"bert.{old}"] = tensors.pop(name)

    old = with_tensors(encoder_source, tmp_path / "old", age)
    expected = load_dense(open_checkpoint(encoder_source)).state_dict()
    for name, value in load_dense(old).state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("which", ["encoder_source", "lm_source"])
def test_layers_are_every_matrix_that_can_be_replaced(which: str, request: pytest.FixtureRequest) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(which))
    model = load_dense(checkpoint)
    found = layers(model)
    assert found == layers(skeleton(checkpoint))
    for layer in found:
        assert tuple(model.get_parameter(f"{layer.name}.weight").shape) == layer.shape
    roles = {layer.name: layer.role for layer in found}
    blocks = checkpoint.config["num_hidden_layers"]
    assert list(roles.values()).count("linear") == (6 if which == "encoder_source" else 7) * blocks
    if which == "lm_source":
        assert [(layer.name, layer.tied_to) for layer in found if layer.role == "head"] == [
            ("lm_head", "model.embed_tokens")
        ]
    else:
        assert roles["embeddings.word_embeddings"] == "embedding"
        assert "embeddings.token_type_embeddings" not in roles


def test_a_head_of_its_own_is_tied_to_nothing() -> None:
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    heads = [layer for layer in layers(transformers.LlamaForCausalLM(config)) if layer.role == "head"]
    assert [(layer.name, layer.tied_to) for layer in heads] == [("lm_head", None)]


def test_a_dense_model_is_frozen_and_ready(encoder_source: Path) -> None:
    model = load_dense(open_checkpoint(encoder_source))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any("pooler" in name for name, _ in model.named_modules() if name != "pooler")


def test_transformers_is_as_loud_afterwards_as_before() -> None:
    before = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    with pytest.raises(ValueError, match="x"), modeling.quiet_transformers():
        raise ValueError("x")
    after = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    assert after == before


def test_a_window_that_a_model_does_not_read_is_none() -> None:
    """Conversions leave them behind; Llama and Gemma 1 attend to everything."""
    for config, window in (
        (transformers.LlamaConfig(), None),
        (transformers.GemmaConfig(), None),
        (transformers.MistralConfig(), 7),
        (transformers.Qwen2Config(use_sliding_window=True), 7),
    ):
        config.sliding_window = 7
        assert modeling.sliding_window(config) == window, config.model_type
    assert modeling.sliding_window(transformers.MistralConfig(sliding_window=None)) is None
