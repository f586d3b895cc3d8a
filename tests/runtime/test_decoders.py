"""The genai loader and the hand-fed decoder are two readings of one folder; they must agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgec.errors import CheckpointError, UsageError
from edgec.runtime import RuntimeOptions, open_artifact
from edgec.runtime.genai import GenaiModel
from edgec.runtime.layout import inside
from edgec.runtime.ort_decoder import OrtDecoder

IDS = np.array([[5, 17, 300, 44, 9, 250, 31, 8, 77]], dtype=np.int64)


@pytest.fixture(scope="module")
def genai(lm_folder: Path) -> GenaiModel:
    model = open_artifact(lm_folder, RuntimeOptions(threads=1))
    assert isinstance(model, GenaiModel)
    return model


@pytest.fixture(scope="module")
def decoder(lm_folder: Path) -> OrtDecoder:
    return OrtDecoder(lm_folder, RuntimeOptions(threads=1))


def test_chunked_logits_equal_the_whole_prefill(genai: GenaiModel, decoder: OrtDecoder) -> None:
    whole = genai.logits(IDS)
    assert whole.shape == (IDS.shape[1], genai.vocab_size) and whole.dtype == np.float32
    for chunk in (1, 2, 4, 128):
        np.testing.assert_allclose(decoder.logits(IDS, chunk), whole, atol=2e-5)
    assert [p.shape[0] for p in decoder.logits_chunks(IDS[0], 4)] == [4, 4, 1]


def test_greedy_text_is_the_same_by_hand_and_by_genai(genai: GenaiModel, decoder: OrtDecoder) -> None:
    expected = decoder.greedy(IDS, 12)
    assert list(genai.forced(IDS[0], 12)) == expected
    assert [p.token for p in genai.generate(IDS[0].tolist(), 12)] == expected


def test_text_goes_in_and_out(genai: GenaiModel) -> None:
    assert genai.decode(genai.encode("the cat")) == "the cat"
    assert len(list(genai.generate("the cat", max_new_tokens=3))) == 3
    sampled = list(genai.generate("the", 4, greedy=False, temperature=0.7, top_k=5, random_seed=1))
    assert 1 <= len(sampled) <= 4


def test_generation_stops_when_the_context_is_full(genai: GenaiModel) -> None:
    prompt = [5] * (genai.context_length - 2)
    assert len(list(genai.generate(prompt, max_new_tokens=50))) == 2


@pytest.mark.parametrize("ids", [[], [-1], [640], [5] * 512])
def test_ids_that_the_runtime_cannot_take_are_refused(genai: GenaiModel, decoder: OrtDecoder, ids: list[int]) -> None:
    with pytest.raises(UsageError):
        genai.generate(ids)
    with pytest.raises(UsageError):
        decoder.greedy(np.array(ids, dtype=np.int64), 1)


def test_an_unknown_sampling_option_is_refused(genai: GenaiModel) -> None:
    with pytest.raises(UsageError, match="temprature"):
        genai.generate("the", greedy=False, temprature=1.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": "640"}, "vocab_size"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"context_length": 0}, "context_length"),
        ({"decoder": None}, "decoder"),
        ({"filename": "../../etc/passwd"}, "outside"),
        ({"filename": "gone.onnx"}, "not in"),
    ],
)
def test_a_lying_config_is_one_clear_error(lm_folder: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = tmp_path / "lm"
    shutil.copytree(lm_folder, folder)
    path = folder / "genai_config.json"
    record = json.loads(path.read_text())
    if "filename" in change:
        record["model"]["decoder"].update(change)
    else:
        record["model"].update(change)
    path.write_text(json.dumps(record))
    for loader in (GenaiModel, OrtDecoder):
        with pytest.raises(CheckpointError, match=said):
            loader(folder)


@pytest.mark.parametrize(
    "hostile",
    [
        {"model": {"decoder": {"session_options": {"custom_ops_library": "evil.so"}}}},
        {"model": {"decoder": {"session_options": {"enable_profiling": "/tmp/trace"}}}},
        {"model": {"decoder": {"session_options": {"session.optimized_model_filepath": "x"}}}},
        {"model": {"decoder": {"session_options": ["custom_ops_library"]}}},
        {"model": {"decoder": {"session_options": {"provider_options": [{"QNN": {"backend_path": "evil.so"}}]}}}},
        {"model": {"decoder": {"session_options": {"provider_options": {"cuda": {}}}}}},
        {"model": {"vision": [{"session_options": {"custom_ops_library": "evil.so"}}]}},
        {"engine": {"deep": [[{"session_options": {"custom_ops_library": "evil.so"}}]]}},
    ],
    ids=range(8),
)
def test_a_config_that_names_native_code_is_refused_before_genai_reads_it(
    lm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hostile: dict[str, Any]
) -> None:
    """genai loads `custom_ops_library` from the folder while it opens the model: code in an artifact would run."""
    folder = tmp_path / "lm"
    shutil.copytree(lm_folder, folder)
    path = folder / "genai_config.json"

    def merged(into: Any, added: Any) -> Any:
        if not isinstance(into, dict) or not isinstance(added, dict):
            return added
        return {**into, **{key: merged(into.get(key), value) for key, value in added.items()}}

    path.write_text(json.dumps(merged(json.loads(path.read_text()), hostile)))
    monkeypatch.setattr("edgec.runtime.genai.import_genai", lambda: pytest.fail("genai saw the file"))
    with pytest.raises(CheckpointError, match="not one that edgec"):
        GenaiModel(folder)


def test_a_config_that_two_parsers_may_read_differently_is_refused(lm_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    shutil.copytree(lm_folder, folder)
    path = folder / "genai_config.json"
    hidden = '{"session_options": {"custom_ops_library": "evil.so"}, "session_options": {'
    path.write_text(path.read_text().replace('{\n            "session_options": {', hidden, 1))
    with pytest.raises(CheckpointError, match="stands twice"):
        GenaiModel(folder)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_names_that_no_file_has(lm_folder: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no name of a file|not in"):
        inside(lm_folder, name, lm_folder / "genai_config.json")
