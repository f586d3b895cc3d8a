"""Inputs made from a signature fit it, at the start and after a cached step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from runtime_tests.model_inputs import decoder_inputs, encoder_inputs, vocabulary_size


def _save(folder: Path, inputs: dict[str, tuple[int, list[int | str]]]) -> Path:
    """A graph that only has a signature."""
    infos = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    onnx.save(helper.make_model(helper.make_graph([], "signature", infos, [])), folder / "model.onnx")
    return folder / "model.onnx"


def test_encoder_padding_is_masked_and_only_declared_inputs_are_given(tmp_path: Path) -> None:
    shape: list[int | str] = ["batch", "tokens"]
    model = _save(tmp_path, {"input_ids": (TensorProto.INT64, shape), "attention_mask": (TensorProto.INT32, shape)})
    inputs = encoder_inputs(model, np.array([[5, 6, 7], [8, 9, 9]]), np.array([3, 1]))
    assert list(inputs) == ["input_ids", "attention_mask"]
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert inputs["attention_mask"].dtype == np.int32
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_decoder_starts_empty_and_goes_on_from_what_came_out(tmp_path: Path) -> None:
    cache: list[int | str] = ["batch", 2, "past", "size"]
    model = _save(
        tmp_path,
        {
            "input_ids": (TensorProto.INT64, ["batch", "tokens"]),
            "attention_mask": (TensorProto.INT64, ["batch", "total"]),
            "position_ids": (TensorProto.INT64, ["batch", "tokens"]),
            "past_key_values.0.key": (TensorProto.FLOAT, cache),
            "past_key_values.0.value": (TensorProto.FLOAT16, ["batch", 2, "past", 8]),
        },
    )
    config = {"model": {"decoder": {"head_size": 16}, "vocab_size": 512}}
    (tmp_path / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert vocabulary_size(tmp_path) == 512
    start = decoder_inputs(model, np.array([[1, 2, 3]]))
    assert start["past_key_values.0.key"].shape == (1, 2, 0, 16)
    assert start["past_key_values.0.value"].shape == (1, 2, 0, 8)
    assert start["past_key_values.0.value"].dtype == np.float16
    assert start["position_ids"].tolist() == [[0, 1, 2]]
    outputs = {f"present.0.{kind}": np.ones((1, 2, 3, 16)) for kind in ("key", "value")}
    step = decoder_inputs(model, np.array([[4]]), {"logits": np.zeros((1, 3, 512)), **outputs})
    assert set(step) == set(start)
    assert step["past_key_values.0.key"].shape == (1, 2, 3, 16)
    assert step["position_ids"].tolist() == [[3]]
    assert step["attention_mask"].tolist() == [[1, 1, 1, 1]]
