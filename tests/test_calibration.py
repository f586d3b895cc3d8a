"""Text in, token batches out: splits that never move, files that lie, windows of the right length."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec import calibration, limits
from edgec.calibration import SPLITS, Text, load_text, pad, self_sampled, tokenize
from edgec.errors import CalibrationError
from edgec.modeling import DECODER_TASK, ENCODER_TASK


class Words:
    """One id per word; 1 and 2 around it, as an encoder's tokenizer adds them."""

    def __init__(self, special: bool = True) -> None:
        self.special = special

    def __call__(self, text: str, truncation: bool = False, max_length: int = 1 << 30) -> dict[str, list[int]]:
        ids = [3 + len(word) for word in text.split()]
        ids = [1, *ids, 2] if self.special else ids
        return {"input_ids": ids[:max_length] if truncation else ids}


def test_the_default_text_is_in_every_python() -> None:
    text = load_text()
    assert text.origin == "pydoc_data.topics"
    assert len(text.items) > 1000
    assert all(len(item) >= 20 and "\n" not in item for item in text.items)
    assert len(set(text.items)) == len(text.items)


def test_splits_are_disjoint_and_whole() -> None:
    text = load_text()
    parts = [text.split(name).items for name in SPLITS]
    assert sorted(item for part in parts for item in part) == sorted(text.items)
    shares = [len(part) / len(text.items) for part in parts]
    assert shares == pytest.approx([0.6, 0.1, 0.1, 0.2], abs=0.03)


@settings(max_examples=30)
@given(items=st.lists(st.text(), unique=True, max_size=30), more=st.lists(st.text(), unique=True, max_size=30))
def test_more_text_moves_nothing_between_splits(items: list[str], more: list[str]) -> None:
    for name in SPLITS:
        before = Text("x", tuple(items)).split(name).items
        after = Text("x", tuple(dict.fromkeys(items + more))).split(name).items
        assert [item for item in after if item in items] == list(before)


def test_text_files_are_paragraphs_or_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n\r\nthree\r\n\r\none\r\ntwo\r\n")
    assert load_text(file).items == ("one\ntwo", "three")
    file.write_text("one\ntwo\n\x20\none\n")
    assert load_text(file).items == ("one", "two")


def test_jsonl_files_are_strings_or_objects(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = [
        json.dumps("one"),
        json.dumps({"text": "two \u2028 lines", "id": 3}, ensure_ascii=False),
        "",
        '"half \\ud83d"',
    ]
    file.write_text("\n".join([*lines, '"  "']), encoding="utf-8")
    assert load_text(file).items == ("one", "two \u2028 lines", "half ?")
    assert sum(len(load_text(file).split(name).items) for name in SPLITS) == 3


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"txt": "x"}', 'a.jsonl:2: expected a string or an object with "text"'),
        ("[1]", "a.jsonl:2: expected a string"),
        ("{", "a.jsonl:2: not JSON"),
        ("[" * 1000, "nested deeper"),
        ('{"text": "a", "text": "b"}', "appears twice"),
    ],
)
def test_a_broken_jsonl_line_is_named(line: str, match: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('"fine"\n' + line + "\n")
    with pytest.raises(CalibrationError, match=match):
        load_text(file)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_text(tmp_path / "nowhere.txt")
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_text(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CalibrationError, match=r"not UTF-8 \(byte 3\)"):
        load_text(tmp_path / "latin.txt")
    monkeypatch.setattr(limits, "MAX_CALIBRATION_BYTES", 100)
    (tmp_path / "long.txt").write_text("x" * 101)
    for endless in (tmp_path / "long.txt", Path("/dev/zero")):
        with pytest.raises(CalibrationError, match="larger than"):
            load_text(endless)


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    """As in --calibration <(zcat corpus.gz)."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("one\n\ntwo",))
    writer.start()
    assert load_text(pipe).items == ("one", "two")
    writer.join()


def test_encoder_batches_are_padded_among_their_like() -> None:
    text = Text("x", tuple("word " * n for n in range(1, 80)))
    found = tokenize(text, Words(), ENCODER_TASK, 10**6, context=32, minimum=1)
    lengths = [int(row.sum()) for batch in found.items for row in batch["attention_mask"]]
    assert lengths == sorted(lengths)
    assert max(lengths) == 32
    assert len(lengths) == 79
    assert found.tokens == sum(lengths)
    for batch in found.items:
        assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
        assert batch["input_ids"].numel() <= calibration.BATCH_TOKENS
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
        assert (batch["input_ids"][batch["attention_mask"] == 1] > 0).all()


def test_decoder_windows_are_full() -> None:
    text = Text("x", ("word " * 300,) * 5)
    found = tokenize(text, Words(), DECODER_TASK, 10**6, minimum=1)
    assert {batch["input_ids"].shape[1] for batch in found.items} == {calibration.DECODER_LENGTH}
    assert found.tokens == 302 * 5 // calibration.DECODER_LENGTH * calibration.DECODER_LENGTH
    short = tokenize(text, Words(), DECODER_TASK, 10**6, context=100, minimum=1)
    assert {batch["input_ids"].shape[1] for batch in short.items} == {100}
    tiny = tokenize(Text("x", ("a b c",)), Words(), DECODER_TASK, 10**6, minimum=1)
    assert tiny.tokens == 5


def test_no_more_tokens_than_asked_for() -> None:
    text = Text("x", ("word " * 50,) * 1000)
    for task in (ENCODER_TASK, DECODER_TASK):
        assert 2000 <= tokenize(text, Words(), task, 2048).tokens + calibration.DECODER_LENGTH <= 2048 + 2 * 256


@pytest.mark.parametrize("task", [ENCODER_TASK, DECODER_TASK])
@pytest.mark.parametrize("items", [(), ("",), ("a few words",)])
def test_too_little_text_is_refused(task: str, items: tuple[str, ...]) -> None:
    for special in (True, False):
        with pytest.raises(CalibrationError, match=r"mine: \d+ tokens; at least 2048 .*--calibration"):
            tokenize(Text("mine", items), Words(special), task, 10_000)


def test_padding_is_on_the_right() -> None:
    batch = pad([[5, 6, 7], [8]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_causal_lm_samples_its_own_text() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=24,
        bos_token_id=3,
    )
    model: Any = transformers.LlamaForCausalLM(config).eval()
    first, again, other = (self_sampled(model, 24 * 12, seed) for seed in (0, 0, 1))
    ids = torch.cat([batch["input_ids"] for batch in first.items])
    assert ids.shape == (12, 24)
    assert first.tokens == 24 * 12
    assert (ids[:, 0] == 3).all()
    assert torch.equal(ids, torch.cat([batch["input_ids"] for batch in again.items]))
    assert not torch.equal(ids, torch.cat([batch["input_ids"] for batch in other.items]))
    # The samples are the model's own distribution: they are likelier under it than uniform tokens are.
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    own = logits.gather(-1, ids[:, 1:, None]).mean()
    assert own > logits.mean()


@pytest.mark.parametrize("task", [ENCODER_TASK, DECODER_TASK])
def test_a_few_tokens_come_from_all_over_the_text(task: str) -> None:
    """Word lengths grow through the text: one tenth of it must show them all."""
    items = tuple(" ".join(["w" * (1 + i // 1000)] * 24) + f" {i}" for i in range(20_000))
    whole = sum(len(Words()(item)["input_ids"]) for item in items)
    found = tokenize(Text("x", items), Words(), task, whole // 10)
    ids = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in found.items])
    assert found.tokens == pytest.approx(whole // 10, rel=0.1)
    seen = [int((ids == 3 + length).sum()) for length in range(5, 21)]
    assert min(seen) > 0.3 * max(seen)
