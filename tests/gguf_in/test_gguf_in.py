"""GGUF in: the folder made of a file is the model that the file was made of, and computes what llama.cpp computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from command_for_tests import check_failure, invoke
from decoder_cases import ASSETS, AUTO, LLAMA3, SIZES, YARN
from gguf_for_tests import STRING, gguf, info, pair
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgec import gguf_in, modeling
from edgec.calibration import load_tokenizer
from edgec.checkpoint import open_checkpoint
from edgec.errors import CheckpointError, EdgecError, UnsupportedModelError
from edgec.gguf_header import read_header
from edgec.gguf_in.tokenizer import PROBES

gguf_py = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # rows that Q8_0's blocks of 32 divide
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama, wide heads": ("LlamaConfig", {"head_dim": 32}),
    "llama, llama3 scaling": (
        "LlamaConfig",
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192}, "max_position_embeddings": 16384},
    ),
    "llama, linear scaling": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.5}},
    ),
    "llama, yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True, "head_dim": 32}),
    "gemma": ("GemmaConfig", {"head_dim": 32}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 16, "sliding_window": 7, "num_hidden_layers": 3}),
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 16, "sliding_window": 7, "num_hidden_layers": 7}),
}
TYPES = {"F32": np.float32, "F16": np.float16}


def tiny(config: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = AUTO.from_config(getattr(transformers, config)(**SIZES | WIDE | changes))
    for parameter in model.parameters():  # norms and biases that do something
        scale = 0.3 if parameter.ndim == 1 else 0.08
        parameter.data = parameter.data * (parameter.ndim == 1) + scale * torch.randn_like(parameter)
    return model.eval()


def bpe() -> Any:
    """GPT-2's byte-level BPE with a handful of merges."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("i", "n"), ("Ġ", "the"), ("1", "2")]
    vocabulary = {token: i for i, token in enumerate([*tokens, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    make: Any = transformers.PreTrainedTokenizerFast
    return make(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def vocabulary_metadata(tokenizer: Any, rows: int) -> dict[str, Any]:
    """A byte-level BPE's vocabulary, padded to the table's rows as llama.cpp's converter does it."""
    known = {i: t for t, i in tokenizer.get_vocab().items()}
    control = set(tokenizer.all_special_ids)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [known.get(i, f"[PAD{i}]") for i in range(rows)],
        "tokenizer.ggml.token_type": [5 if i not in known else 3 if i in control else 1 for i in range(rows)],
        "tokenizer.ggml.merges": [" ".join(m) for m in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def write_file(model: Any, path: Path, kind: str = "F32", **changes: Any) -> Path:
    """The model as a GGUF, as llama.cpp's converter writes it. changes: metadata to add, or (None) to leave out."""
    from edgec.export.gguf import metadata, names, writer

    config = model.config
    arch = names.architecture(config.model_type)
    table = names.Names(config.model_type, config.num_hidden_layers)
    tensors = []
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = value.float().numpy()
        if (order := names.row_order(config, name.rpartition(".")[0])) is not None:
            values = values[order]
        if name.endswith("norm.weight"):
            values = values + np.float32(metadata.norm_offset(arch))
        chosen = kind if values.ndim == 2 else "F32"
        stored = gguf_py.quants.quantize(values, gguf_py.GGMLQuantizationType[chosen])
        tensors.append(writer.GgufTensor(table.of(name), values.shape, chosen, lambda stored=stored: stored))
    if (divisors := metadata.rope_divisors(config)) is not None:
        tensors.append(writer.GgufTensor(metadata.ROPE_FREQS, divisors.shape, "F32", lambda: divisors))
    found = metadata.hyperparameters(config, "tiny") | vocabulary_metadata(bpe(), config.vocab_size)
    found = {k: v for k, v in (found | changes).items() if v is not None and v != []}
    writer.write_gguf(path, found, tensors)
    return path


def torch_logits(model: Any, ids: list[int]) -> NDArray[np.float32]:
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.tensor([ids])).logits[0].float().numpy()
    return found


def llama_logits(path: Path, ids: list[int]) -> NDArray[np.float32]:
    model = llama_cpp.Llama(
        str(path),
        n_ctx=64,
        n_batch=64,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        verbose=False,
        type_k=0,
        type_v=0,
    )
    model.eval(ids)
    return np.array(model.scores[: len(ids)], np.float32)


IDS = np.random.default_rng(5).integers(3, 259, 24).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_weights_and_logits(tmp_path: Path, family: str) -> None:
    model = tiny(FAMILIES[family][0], **FAMILIES[family][1])
    path = write_file(model, tmp_path / "tiny.gguf")
    folder = gguf_in.write_folder(path, tmp_path / "back")
    checkpoint = open_checkpoint(folder)
    back = modeling.load_dense(checkpoint)
    for name, expected in model.state_dict().items():
        found = back.state_dict()[name]
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-7 if "gemma" in family else 0)
    expected = torch_logits(model, IDS)
    error = np.abs(torch_logits(back, IDS) - expected).max() / np.abs(expected).max()
    assert error < 1e-5
    theirs = np.abs(llama_logits(path, IDS) - torch_logits(back, IDS)).max() / np.abs(expected).max()
    assert theirs < 2e-3  # llama.cpp rounds the table of exponentials in SiLU and GELU to fp16


@pytest.mark.parametrize(("kind", "tolerance"), [("F16", 0.0), ("BF16", 0.0), ("Q8_0", 0.0)])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_other_types_keep_their_numbers(tmp_path: Path, family: str, kind: str, tolerance: float) -> None:
    model = tiny(FAMILIES[family][0], **FAMILIES[family][1])
    path = write_file(model, tmp_path / "tiny.gguf", kind)
    checkpoint = open_checkpoint(gguf_in.write_folder(path, tmp_path / "back"))
    label = {"Q8_0": "F32"}.get(kind, kind)
    kinds = {info.dtype for info in checkpoint.tensors.values() if len(info.shape) == 2}
    assert kinds == {label}
    weight = model.state_dict()["model.layers.0.mlp.down_proj.weight"].numpy()
    stored = gguf_py.quants.quantize(weight, gguf_py.GGMLQuantizationType[kind])
    expected = gguf_py.quants.dequantize(stored, gguf_py.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(checkpoint.read("model.layers.0.mlp.down_proj.weight").astype(np.float32), expected)


def test_the_tokenizer_is_llama_cpps(tmp_path: Path) -> None:
    path = write_file(tiny("LlamaConfig"), tmp_path / "tiny.gguf", **{"tokenizer.ggml.add_bos_token": True})
    folder = gguf_in.write_folder(path, tmp_path / "back")
    made = load_tokenizer(open_checkpoint(folder))
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in (*PROBES, "A new text, 12 times.", "<s> in words"):
        assert made.encode(text) == theirs.tokenize(text.encode(), add_bos=True, special=True)
    assert (made.bos_token, made.eos_token, made.pad_token) == ("<s>", "</s>", "<pad>")
    assert made.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    defaults = json.loads((folder / "generation_config.json").read_text())
    assert defaults == {"bos_token_id": 1, "eos_token_id": [2]}


def stories_file(tmp_path: Path, **changes: Any) -> Path:
    source = ASSETS / "stories260K-hf"
    if not source.is_dir():
        pytest.skip("EDGEC_ASSETS has no stories260K-hf")
    parsed = json.loads((source / "tokenizer.json").read_text())["model"]
    tokens = [t for t, _ in sorted(parsed["vocab"].items(), key=lambda item: item[1])]
    ranks = {"".join(m): i for i, m in enumerate(parsed["merges"])}
    kinds = [2 if t == "<unk>" else 3 if t in ("<s>", "</s>") else 6 if t.startswith("<0x") else 1 for t in tokens]
    meta = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [float(-ranks.get(t, 1000)) for t in tokens],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.padding_token_id": None,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    model = modeling.load_dense(open_checkpoint(source))
    return write_file(model, tmp_path / "stories.gguf", **meta | changes)


def test_stories_round_trip(tmp_path: Path) -> None:
    path = stories_file(tmp_path)
    folder = gguf_in.write_folder(path, tmp_path / "back")
    original = open_checkpoint(ASSETS / "stories260K-hf")
    back = open_checkpoint(folder)
    for name, tensor in original.tensors.items():
        assert tensor.shape == back.tensors[name].shape
        np.testing.assert_array_equal(original.read(name), back.read(name))
    ours, theirs = load_tokenizer(back), load_tokenizer(original)
    text = 'Once upon a time, there was a little girl named Lily. She loved to play outside!\n"Hi," said Tom.'
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text), skip_special_tokens=True) == text


def test_a_wrong_tokenizer_does_not_go_unnoticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scores upside down give other merges here, while llama.cpp keeps reading the file's."""
    path = stories_file(tmp_path)
    from edgec.gguf_in import tokenizer

    honest = tokenizer._described
    flip = lambda header, rows: honest(header, rows) | {"scores": [-s for s in honest(header, rows)["scores"]]}  # noqa: E731
    monkeypatch.setattr(tokenizer, "_described", flip)
    with pytest.raises(CheckpointError, match=r"cannot be rebuilt: llama\.cpp splits"):
        gguf_in.write_folder(path, tmp_path / "back")


def test_without_llama_cpp_the_tokenizer_is_unchecked_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_file(tiny("LlamaConfig"), tmp_path / "tiny.gguf")
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "llama_cpp.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(blocked))
    gguf_in.write_folder(path, tmp_path / "back")
    assert "not compared with llama.cpp's" in caplog.text


REFUSED: dict[str, tuple[dict[str, Any], type[EdgecError], str]] = {
    "another family": ({"general.architecture": "mamba"}, UnsupportedModelError, r"'mamba'.*llama, qwen2"),
    "an adapter": ({"general.type": "adapter"}, UnsupportedModelError, "not a model but 'adapter'"),
    "experts": ({"llama.expert_count": 8}, UnsupportedModelError, "mixture of experts"),
    "no width": ({"llama.embedding_length": None}, CheckpointError, r"lack 'llama\.embedding_length'"),
    "a width in words": ({"llama.embedding_length": "64"}, CheckpointError, "expected a whole number"),
    "2^31 layers": ({"llama.block_count": 1 << 31}, CheckpointError, "from 1 to 4096"),
    "no heads": ({"llama.attention.head_count": 0}, CheckpointError, "from 1 to"),
    "NaN": ({"llama.rope.freq_base": float("nan")}, CheckpointError, "expected a finite number"),
    "half-rotated heads": ({"llama.rope.dimension_count": 8}, UnsupportedModelError, "only a part of each head"),
    "longrope": ({"llama.rope.scaling.type": "longrope"}, UnsupportedModelError, "'longrope'"),
    "unknown scaling": ({"llama.rope.scaling.attn_factor": 0.5}, UnsupportedModelError, "'attn_factor'"),
    "too few tokens": ({"tokenizer.ggml.tokens": ["a", "b"]}, CheckpointError, "2 tokens, but .* has 272 rows"),
    "another vocab_size": ({"llama.vocab_size": 271}, CheckpointError, "vocab_size is 271"),
    "a token past the end": ({"tokenizer.ggml.eos_token_id": 272}, CheckpointError, "from 0 to 271"),
    "equal tokens": ({"tokenizer.ggml.tokens": ["a"] * 272}, CheckpointError, "271 tokens are there twice"),
    "a long token": (
        {"tokenizer.ggml.tokens": ["a" * 4000, *map(str, range(271))]},
        CheckpointError,
        "a token of 4000 characters",
    ),
    "an unknown tokenizer": ({"tokenizer.ggml.model": "rwkv"}, CheckpointError, "'rwkv' tokenizer"),
    "a merge of strangers": ({"tokenizer.ggml.merges": ["xx yy"]}, CheckpointError, "merge 'xx yy'"),
    "a merge of three": ({"tokenizer.ggml.merges": ["a b c"]}, CheckpointError, "merge 'a b c'"),
    "types of other tokens": ({"tokenizer.ggml.token_type": [1, 1]}, CheckpointError, "2 of tokenizer.ggml.token_type"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_file_that_cannot_be_read(tmp_path: Path, fault: str) -> None:
    changes, error, message = REFUSED[fault]
    path = write_file(tiny("LlamaConfig"), tmp_path / "tiny.gguf", **changes)
    with pytest.raises(error, match=message):
        gguf_in.write_folder(path, tmp_path / "back")


def test_a_quantised_file_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = write_file(tiny("LlamaConfig"), tmp_path / "tiny.gguf", "Q4_0")
    with pytest.raises(CheckpointError, match=r"is Q4_0, already quantised; edgec reads F32, F16, BF16 and Q8_0"):
        gguf_in.write_folder(path, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_tensors_without_a_place(tmp_path: Path) -> None:
    model = tiny("LlamaConfig")
    path = write_file(model, tmp_path / "tiny.gguf", **{"general.architecture": "gemma"})
    with pytest.raises(CheckpointError, match="lack 'gemma"):
        gguf_in.write_folder(path, tmp_path / "back")


def test_a_vocabulary_alone(tmp_path: Path) -> None:
    path = tmp_path / "vocab.gguf"
    path.write_bytes(gguf([pair("general.architecture", STRING, "llama")]))
    with pytest.raises(CheckpointError, match="a vocabulary alone is not a model"):
        gguf_in.write_folder(path, tmp_path / "back")


def test_a_table_of_rotary_factors_that_no_rule_gives(tmp_path: Path) -> None:
    model = tiny("LlamaConfig", rope_parameters=LLAMA3 | {"original_max_position_embeddings": 777})
    path = write_file(model, tmp_path / "tiny.gguf")
    with pytest.raises(UnsupportedModelError, match="other factors than Llama 3's"):
        gguf_in.write_folder(path, tmp_path / "back")


# The command line


def test_inspect_tells_what_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_file(tiny("LlamaConfig"), tmp_path / "tiny.gguf", "Q8_0")
    said = invoke(capsys, "inspect", path, "--json")
    found = json.loads(said.out)
    header = read_header(path)
    assert found["kind"] == "GGUF file"
    assert found["architecture"] == "llama"
    assert found["parameters"] == sum(t.elements for t in header.tensors.values())
    assert "Q8_0" in found["types"]
    assert invoke(capsys, "inspect", path).code == 0


def test_export_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_file(tiny("LlamaConfig"), tmp_path / "tiny.gguf")
    words = (
        "export",
        path,
        "-t",
        "onnx-x64",
        "--plan",
        "dense:fp32",
        "--plain",
        "--no-quality",
        "-o",
        tmp_path / "out",
    )
    said = invoke(capsys, *words)
    assert said.code == 0, said.err
    manifest = json.loads((tmp_path / "out" / "edgec.json").read_text())
    back = open_checkpoint(gguf_in.write_folder(path, tmp_path / "back"))
    assert manifest["fingerprint"] == back.fingerprint


def test_hostile_files_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf([pair("general.architecture", STRING, "llama")], [info("a", [1 << 40])]))
    for words in (("inspect", path), ("export", path, "-t", "onnx-x64", "-o", tmp_path / "out"), ("profile", path)):
        check_failure(invoke(capsys, *words), 1, r"bad\.gguf: tensor 'a' .* truncated or damaged")
    assert not (tmp_path / "out").exists()
