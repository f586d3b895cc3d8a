"""The llama.cpp loader: generation, forced tokens, logits, sampling, and what it refuses."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from models_for_tests import write_causal_lm

from edgec import modeling
from edgec.bench.harness import BenchSettings, Contestant, run_bench
from edgec.checkpoint import open_checkpoint
from edgec.errors import CheckpointError, RuntimeUnavailableError, UsageError
from edgec.export.gguf import stock
from edgec.export.gguf.writer import tensor_of, write_gguf
from edgec.fit import fit
from edgec.quantize.formats import LayerFormat
from edgec.records import Spec
from edgec.runtime import RuntimeOptions, llama_cpp, open_artifact
from edgec.runtime.llama_cpp import LlamaCpp, Vocabulary
from edgec.runtime.llama_opening import model_params

pytest.importorskip("llama_cpp", reason="needs the extra edgec[gguf]")


def written(source: Path, out: Path, fmt: str = "fp32") -> Path:
    """In floats unless told otherwise: no kernel rounds activations, so that one call agrees with another."""
    checkpoint = open_checkpoint(source)
    draft = stock.draft(checkpoint)
    state = modeling.load_dense(checkpoint).state_dict()
    cores: dict[str, Any] = {}
    for layer in modeling.layers(modeling.without_memory(checkpoint)):
        weight = state[f"{layer.name}.weight"].numpy()
        own = fit(weight, Spec("dense"), LayerFormat.parse(fmt), role=layer.role).cores["weight"]
        cores[layer.name] = cores[layer.tied_to] if layer.tied_to else own
    out.mkdir()
    write_gguf(out / "model.gguf", draft.metadata, stock.tensors(draft, cores))
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("gguf")
    return written(write_causal_lm(base / "source"), base / "artifact")


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaCpp:
    opened = open_artifact(folder, RuntimeOptions(threads=1))
    assert isinstance(opened, LlamaCpp)
    return opened


def test_greedy_tokens_are_the_likeliest_ones(model: LlamaCpp) -> None:
    ids = model.encode("def f(x):")
    expected = []
    for _ in range(6):
        values = model.logits(np.array([*ids, *expected]))[-1]
        values[model.vocabulary.ends()] = -np.inf
        expected.append(int(values.argmax()))
    assert list(model.forced(ids, 6)) == expected
    free = [p.token for p in model.generate(ids, 6)]
    assert free == expected[: len(free)]


def test_a_file_of_any_name_is_opened_and_measured_like_a_folder(model: LlamaCpp, folder: Path, tmp_path: Path) -> None:
    stored = tmp_path / "blob-7f3a"  # as a hub's cache keeps it
    stored.write_bytes((folder / "model.gguf").read_bytes())
    path = tmp_path / "theirs.q4.gguf"
    path.symlink_to(stored)
    ids = np.array([5, 6, 7])
    opened: Any = open_artifact(path, RuntimeOptions(threads=1))
    np.testing.assert_array_equal(opened.logits(ids), model.logits(ids))
    quick = BenchSettings(rounds=1, samples=1, warmup=0, min_sample_s=0.0, prompt_tokens=8, new_tokens=4, threads=1)
    (row,) = run_bench([Contestant(path.name, path)], quick)
    assert row.artifact_bytes == path.stat().st_size and row.metrics["decode_tok_s"].value > 0
    with pytest.raises(CheckpointError, match=r"is not a folder; .* or a \.gguf file"):
        open_artifact(tmp_path / "missing.gguf")


def test_a_long_prompt_is_read_in_parts(model: LlamaCpp) -> None:
    """Chunks of the logits continue one another; 300 tokens are more than one chunk."""
    ids = np.random.default_rng(0).integers(3, 250, 300)
    whole = model.logits(ids)
    assert whole.shape == (300, model.vocab_size)
    parts = np.concatenate(list(model.logits_chunks(ids, chunk=37)))
    assert np.linalg.norm(parts - whole) < 0.02 * np.linalg.norm(whole)
    first = next(iter(model.forced(ids.tolist(), 1)))
    values = whole[-1].copy()
    values[model.vocabulary.ends()] = -np.inf
    assert first == int(values.argmax())


def test_one_context_serves_many_calls(model: LlamaCpp) -> None:
    """A cleared context remembers nothing, whatever ran before it."""
    ids = np.arange(5, 45)
    before = model.logits(ids)
    list(model.forced([7, 8, 9], 30))
    np.testing.assert_array_equal(model.logits(ids), before)


def test_one_text_at_a_time(model: LlamaCpp) -> None:
    """The one context may have been freed for a larger one; and an id outside the vocabulary would end the process."""
    first = model.generate("abc", 20)
    next(first)
    model.logits(np.arange(5, 100))
    with pytest.raises(UsageError, match="another text was begun"):
        next(first)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        model.decode([10**6])
    with pytest.raises(UsageError, match="repetition_penalty must be above 0"):
        next(model.generate("abc", 1, greedy=False, repetition_penalty=0.0))


def test_sampling_is_seeded(model: LlamaCpp) -> None:
    def sampled(seed: int) -> list[int]:
        options = {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1, "random_seed": seed}
        return [p.token for p in model.generate("abc", 12, greedy=False, **options)]

    assert sampled(1) == sampled(1)
    assert len({tuple(sampled(seed)) for seed in range(4)}) > 1
    with pytest.raises(UsageError, match="unknown sampling option 'beams'"):
        model.generate("abc", 1, greedy=False, beams=2)


def test_text_survives_bytes_that_are_split_over_tokens(model: LlamaCpp) -> None:
    text = "naïve 🙂"
    assert model.decode(model.encode(text)) == text


def test_context_and_vocabulary_are_kept(model: LlamaCpp) -> None:
    assert model.context_length == 512
    assert model.vocab_size == 320
    with pytest.raises(UsageError, match="do not fit the context of 512"):
        next(model.forced([5] * 510, 3))
    with pytest.raises(UsageError, match="outside the vocabulary"):
        model.logits(np.array([320]))
    with pytest.raises(UsageError, match="the prompt is empty"):
        model.generate([], 3)
    assert len(list(model.generate([5] * 510, 9))) <= 2


def test_a_damaged_file_is_refused_before_llama_cpp_sees_it(folder: Path, tmp_path: Path) -> None:
    data = (folder / "model.gguf").read_bytes()
    for name, bad in {"short": data[:-100], "text": b"not a gguf", "empty": b""}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.gguf").write_bytes(bad)
        with pytest.raises(CheckpointError, match="model.gguf"):
            LlamaCpp(tmp_path / name)


def test_a_file_that_llama_cpp_refuses_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_gguf(tmp_path / "model.gguf", {"general.architecture": "llama"}, [tensor_of("x", np.zeros(4, np.float32))])
    with caplog.at_level(logging.WARNING), pytest.raises(CheckpointError, match="llama.cpp cannot load"):
        LlamaCpp(tmp_path)
    assert "missing" in caplog.text or "not found" in caplog.text  # its own reason, through logging


def test_without_a_vocabulary_ids_work_and_text_is_refused(folder: Path, tmp_path: Path) -> None:
    source = write_causal_lm(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink(missing_ok=True)
    plain = LlamaCpp(written(source, tmp_path / "out"), RuntimeOptions(threads=1))
    assert len(list(plain.generate([5, 6, 7], 4))) == 4
    np.testing.assert_array_equal(plain.logits(np.array([5, 6])), LlamaCpp(folder).logits(np.array([5, 6])))
    with pytest.raises(CheckpointError, match="no vocabulary"):
        plain.generate("text", 4)


def vocabulary_file(path: Path, **metadata: Any) -> Path:
    """A file of metadata only: byte tokens and both marks, or another model's own."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "\u2581b"]
    told: dict[str, Any] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    if "model" in metadata:
        del told["tokenizer.ggml.bos_token_id"], told["tokenizer.ggml.eos_token_id"]
    told |= {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    tokens = told["tokenizer.ggml.tokens"]
    kinds = [6 if token.startswith("<0x") else 3 if token in ("<s>", "</s>") else 1 for token in tokens]
    told |= {"tokenizer.ggml.scores": [0.0] * len(tokens), "tokenizer.ggml.token_type": kinds}
    write_gguf(path, told, [])
    return path


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokens": ["<unk>", "<s>", "a", "a"]}, "holds the token 'a' twice"),
        ({"tokens": ["<unk>", "<s>", "", "[EMPTY_2]"]}, r"holds the token '\[EMPTY_2\]' twice"),
        ({"tokens": ["<unk>", "<s>", "a\0x", "a\0y"]}, "holds a NUL"),
        ({"model": "bert", "tokens": ["[CLS]", "[SEP]", "<0x41>"]}, "a vocabulary of kind 'bert'"),
    ],
)
def test_vocabularies_that_would_end_the_process_are_refused(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    """llama.cpp aborts when it opens them."""
    path = vocabulary_file(tmp_path / "model.gguf", **metadata)
    for opened in (Vocabulary, LlamaCpp):
        with pytest.raises(CheckpointError, match=message):
            opened(path)


@pytest.mark.parametrize(
    ("metadata", "text", "message"),
    [
        ({"tokens": ["<unk>", "<s>", "</s>", "a"]}, "a b", "no tokens for"),
        ({"tokens": ["<unk>", "<s>", "</s>", *BYTES[:128], *map(chr, range(128, 256))]}, "\u4e2d", "no tokens for"),
        ({"tokens": ["<unk>", "<s>", "</s>", *BYTES[1:]]}, "a\0b", "no tokens for"),
        (
            {"model": "gpt2", "pre": "llama-bpe", "tokens": ["a", "b", "c", "ab"], "merges": ["a b"]},
            "ab",
            "no token that begins a text",
        ),
    ],
)
def test_texts_that_would_end_the_process_are_refused(
    tmp_path: Path, metadata: dict[str, Any], text: str, message: str
) -> None:
    """These open, and llama.cpp aborts when it reads the text."""
    with pytest.raises(CheckpointError, match=message):
        Vocabulary(vocabulary_file(tmp_path / "model.gguf", **metadata)).encode(text)


def test_a_vocabulary_without_bytes_reads_what_it_has_tokens_for(tmp_path: Path) -> None:
    assert Vocabulary(vocabulary_file(tmp_path / "sound.gguf")).encode("a b \u4e2d")[0] == 1
    bare = Vocabulary(vocabulary_file(tmp_path / "bare.gguf", tokens=["<unk>", "<s>", "</s>", "\u2581", "a"]))
    assert bare.encode("a a") == [1, 3, 4, 3, 4]


def test_a_vocabulary_needs_no_weights(folder: Path, model: LlamaCpp) -> None:
    alone = Vocabulary(folder / "model.gguf")
    assert alone.encode("some text") == model.encode("some text")
    assert alone.size == 320


def test_without_the_package_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    llama_cpp.import_llama_cpp.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(RuntimeUnavailableError, match=r"edgec\[gguf\]"):
        llama_cpp.prepare()
    monkeypatch.undo()
    llama_cpp.import_llama_cpp.cache_clear()


def test_a_build_without_gpus_refuses_one(folder: Path) -> None:
    """llama.cpp itself would compute on the CPU and say nothing."""
    if llama_cpp.import_llama_cpp().llama_supports_gpu_offload():
        pytest.skip("this llama-cpp-python has a GPU back end")
    with pytest.raises(RuntimeUnavailableError, match="has 0 GPUs and was asked for number 0.*GGML_CUDA"):
        LlamaCpp(folder, RuntimeOptions(threads=1, gpu=0))


def test_the_processor_alone_means_a_list_of_no_devices() -> None:
    """Without a list, a build for GPUs sends prompts of 32 tokens and more to one, though no layer lies there."""
    params = model_params(llama_cpp.import_llama_cpp())
    assert ctypes.c_void_p.from_address(params.devices).value is None


def test_the_cache_may_be_q8_0(folder: Path, model: LlamaCpp) -> None:
    """Half the bytes, nearly the same logits; f16 is what llama.cpp takes by itself."""
    ids = np.array(model.encode("def f(x):\n    return x"))
    exact = model.logits(ids)
    named, coarse = (LlamaCpp(folder, RuntimeOptions(1, kv_cache=kind)).logits(ids) for kind in ("f16", "q8_0"))
    np.testing.assert_array_equal(named, exact)
    assert 0 < np.abs(coarse - exact).max() < 0.1 * np.abs(exact).max()


class _Build:
    """In place of the llama_cpp module; hashable as modules are."""

    def __init__(self, **functions: Any) -> None:
        vars(self).update(functions)


@pytest.mark.parametrize(("said", "packs"), [(b"AVX512 = 1 | AMX_INT8 = 1 | ", False), (b"AVX512 = 1 | ", True)])
def test_a_build_with_amx_is_kept_from_using_it(said: bytes, packs: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It ends the process in most builds; nothing short of trying finds the sound ones."""
    build = _Build(
        llama_print_system_info=lambda: said,
        llama_model_default_params=lambda: SimpleNamespace(use_extra_bufts=True, n_gpu_layers=-1, devices=None),
    )
    assert model_params(build, vocab_only=True).use_extra_bufts and not caplog.text
    params = model_params(build)
    assert (params.use_extra_bufts, params.n_gpu_layers) == (packs, 0)
    assert ("-mno-amx-int8" in caplog.text) == (not packs)
