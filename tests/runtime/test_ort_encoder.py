"""The encoder loader: shapes, order, padding, truncation, and folders that are not what they claim."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import artifacts_for_tests as artifacts
import numpy as np
import pytest

from edgec.errors import CheckpointError, NumericsError
from edgec.runtime import open_artifact
from edgec.runtime.ort_encoder import OrtEncoder

SENTENCES = ["the cat sat", "a dog", "the dog sat on the mat", "text", "the model is a cat and a dog"]


@pytest.mark.parametrize("pooled", [True, False])
def test_embed_is_the_masked_mean_in_the_given_order_whatever_the_batch(tmp_path: Path, pooled: bool) -> None:
    table = np.random.default_rng(1).standard_normal((len(artifacts.WORDS), artifacts.WIDTH)).astype(np.float32)
    model = OrtEncoder(artifacts.encoder(tmp_path / "m", pooled=pooled, table=table))
    ids = [[artifacts.WORDS.index(w) for w in s.split()[: model.max_tokens]] for s in SENTENCES]
    expected = np.stack([table[row].mean(axis=0) for row in ids])
    for batch_size in (1, 2, 32):
        got = model.embed(SENTENCES, batch_size)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_an_empty_list_gives_no_rows(encoder_folder: Path) -> None:
    assert OrtEncoder(encoder_folder).embed([]).shape == (0, artifacts.WIDTH)


def test_tokens_are_padded_right_and_truncated_at_the_smallest_stated_limit(encoder_folder: Path) -> None:
    long = "the cat " * 10
    tokens = OrtEncoder(encoder_folder).tokenize(["cat", long])
    assert tokens["input_ids"].shape == (2, 6)
    assert tokens["attention_mask"].tolist() == [[1, 0, 0, 0, 0, 0], [1] * 6]
    (encoder_folder / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')
    assert OrtEncoder(encoder_folder).token_count(["cat", long]) == 5


def test_a_stated_padding_of_the_tokenizer_file_is_not_obeyed(encoder_folder: Path) -> None:
    path = encoder_folder / "tokenizer.json"
    record = json.loads(path.read_text())
    fixed = {"strategy": {"Fixed": 128}, "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    path.write_text(json.dumps({**record, "padding": {**fixed, "pad_to_multiple_of": None}}))
    assert OrtEncoder(encoder_folder).tokenize(["cat", "the dog"])["input_ids"].shape == (2, 2)


@pytest.mark.parametrize("stated", [1 << 32, -1, "x", [1]])
def test_a_padding_token_that_is_none_is_the_first_one(encoder_folder: Path, stated: Any) -> None:
    path = encoder_folder / "config.json"
    config = {**json.loads(path.read_text()), "max_position_embeddings": 64, "pad_token_id": stated}
    for kind in ("roberta", []):
        path.write_text(json.dumps({**config, "model_type": kind}))
        assert OrtEncoder(encoder_folder).tokenize(["cat", "the dog"])["input_ids"].shape == (2, 2)


def test_open_artifact_finds_an_encoder(encoder_folder: Path) -> None:
    assert open_artifact(encoder_folder).task == "encoder"


def test_nan_is_refused(tmp_path: Path) -> None:
    table = np.full((len(artifacts.WORDS), artifacts.WIDTH), np.nan, dtype=np.float32)
    with pytest.raises(NumericsError, match=r"model\.onnx"):
        OrtEncoder(artifacts.encoder(tmp_path / "m", pooled=True, table=table)).embed(["the cat"])


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", None, "cannot be read"),
        ("config.json", "[]", "JSON object"),
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[" * 200_000, "not valid JSON"),
        ("tokenizer.json", None, "cannot be read"),
        ("tokenizer.json", "{}", "tokenizer"),
        ("model.onnx", "not onnx", "cannot load"),
    ],
)
def test_a_broken_folder_is_one_clear_error(encoder_folder: Path, file: str, content: str | None, said: str) -> None:
    path = encoder_folder / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=said):
        OrtEncoder(encoder_folder)


def test_a_folder_without_any_model_names_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"genai_config\.json"):
        open_artifact(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        open_artifact(tmp_path / "missing")


def test_a_model_outside_its_folder_is_refused(encoder_folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    (encoder_folder / "model.onnx").rename(outside)
    (encoder_folder / "model.onnx").symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside"):
        OrtEncoder(encoder_folder)
