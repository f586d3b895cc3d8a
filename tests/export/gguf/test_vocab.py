"""Vocabularies: real ones agree with transformers on awkward text, and one that llama.cpp cannot split is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from decoder_cases import ASSETS, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from edgec.calibration import load_text, load_tokenizer
from edgec.checkpoint import open_checkpoint
from edgec.errors import CheckpointError, UnsupportedModelError
from edgec.export.gguf.vocab import PROBES, vocabulary
from edgec.export.gguf.writer import write_gguf
from edgec.runtime.llama_cpp import Vocabulary

pytest.importorskip("llama_cpp", reason="needs the extra edgec[gguf]")

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def trained(pre_tokenizer: Any, **special: Any) -> Any:
    """A byte-level BPE of 600 tokens, taught on the default text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    teacher = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(load_text().items[:60], teacher)
    make: Any = transformers.PreTrainedTokenizerFast
    return make(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **special)


def split(pattern: str) -> Any:
    from tokenizers import Regex

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def opened(values: dict[str, Any], rows: int, path: Path) -> Vocabulary:
    write_gguf(path, {"general.architecture": "llama", "llama.vocab_size": rows, **values}, [])
    return Vocabulary(path)


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (split(LLAMA3), "llama-bpe"),
        (split(QWEN2), "qwen2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "smollm",
        ),
    ],
)
def test_the_pre_tokenizer_is_found_by_what_it_does(pre_tokenizer: Any, name: str, tmp_path: Path) -> None:
    tokenizer = trained(pre_tokenizer)
    values = vocabulary(tokenizer, 600)
    assert values["tokenizer.ggml.model"] == "gpt2"
    assert values["tokenizer.ggml.pre"] == name
    found = opened(values, 600, tmp_path / "v.gguf")
    for text in (*PROBES, *load_text().items[:20]):
        assert found.encode(text) == tokenizer(text)["input_ids"]
        assert b"".join(map(found.piece, found.encode(text))).decode() == text


def test_a_pre_tokenizer_that_llama_cpp_lacks_is_refused() -> None:
    odd = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # tokens reach across words
    with pytest.raises(UnsupportedModelError, match="none of llama.cpp's tokenizers"):
        vocabulary(trained(odd), 600)


def test_a_tokenizer_without_merges_and_with_unused_rows(tmp_path: Path) -> None:
    values = vocabulary(make_tokenizer(), 272)
    found = opened(values, 272, tmp_path / "v.gguf")
    assert found.size == 272
    assert found.encode("hé") == make_tokenizer()("hé")["input_ids"]
    assert found.ends() == [2]


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(CheckpointError, match="the embedding table has 100 rows"):
        vocabulary(make_tokenizer(), 100)


def test_other_kinds_are_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    make: Any = transformers.PreTrainedTokenizerFast
    with pytest.raises(UnsupportedModelError, match="WordLevel tokenizer"):
        vocabulary(make(tokenizer_object=words), 2)


def test_ends_templates_and_special_tokens_ship() -> None:
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.chat_template = "{{ messages[0].content }}"
    values = vocabulary(tokenizer, 600, ends=[1, 7])
    assert values["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert values["tokenizer.ggml.eos_token_id"] == 1
    assert values["tokenizer.ggml.eot_token_id"] == 7
    assert values["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("name", ["stories260K-hf", "pycode-lm"])
def test_real_tokenizers(name: str, tmp_path: Path) -> None:
    if not (ASSETS / name).is_dir():
        pytest.skip(f"EDGEC_ASSETS has no {name}")
    checkpoint = open_checkpoint(ASSETS / name)
    tokenizer = load_tokenizer(checkpoint)
    rows = int(json.loads((ASSETS / name / "config.json").read_text())["vocab_size"])
    found = opened(vocabulary(tokenizer, rows), rows, tmp_path / "v.gguf")
    for text in load_text().items[:40]:
        assert found.encode(text) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_with_and_without_a_leading_blank(prefix: bool, tmp_path: Path) -> None:
    """As Llama 2 (▁ before the text) and Gemma (none) have it, bytes for what is not in the vocabulary."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    special = ["<unk>", "<s>", "</s>"]
    teacher = trainers.BpeTrainer(vocab_size=700, special_tokens=special + bytes_, show_progress=False)
    tokenizer.train_from_iterator((word + " " for text in load_text().items[:40] for word in text.split()), teacher)
    record = json.loads(tokenizer.to_str())
    record["added_tokens"] = record["added_tokens"][:3]
    make: Any = transformers.PreTrainedTokenizerFast
    loaded = make(
        tokenizer_object=Tokenizer.from_str(json.dumps(record)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    values = vocabulary(loaded, 700)
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.add_space_prefix"] is prefix
    found = opened(values, 700, tmp_path / "v.gguf")
    for text in ("plain words, and more", "naïve 🙂", *load_text().items[40:50]):
        assert found.encode(text) == loaded(text)["input_ids"]
