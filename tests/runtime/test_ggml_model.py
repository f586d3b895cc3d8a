"""Dense files through edgec's ggml runtime: bit for bit llama.cpp's logits, in every family and setting."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

from edgec.errors import CheckpointError, NumericsError, RuntimeUnavailableError, UnsupportedModelError, UsageError
from edgec.export.gguf.metadata import ROPE_FREQS, hyperparameters, rope_divisors
from edgec.export.gguf.names import Names, row_order, take_rows
from edgec.export.gguf.writer import GgufTensor, tensor_of, write_gguf
from edgec.quantize import rtn
from edgec.quantize.formats import CoreFormat
from edgec.runtime.ggml import library
from edgec.runtime.ggml.model import GgmlModel
from edgec.runtime.llama_cpp import import_llama_cpp
from edgec.runtime.llama_opening import model_params, uses_amx
from edgec.runtime.options import RuntimeOptions

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 640,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOW = {"sliding_window": 24, "query_pre_attn_scalar": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "llama with biases, tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", WINDOW),
    "gemma3": ("Gemma3", {**WINDOW, "num_hidden_layers": 7}),
}


def write_random(path: Path, family: str, fmt: str, **metadata: Any) -> Path:
    """A random dense model of a family without a vocabulary, its matrices in one format."""
    name, own = FAMILIES[family]
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**{**SIZES, **own})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    names = Names(config.model_type, config.num_hidden_layers)
    values = {**hyperparameters(config, family), "tokenizer.ggml.model": "no_vocab", **metadata}
    generator, tensors = np.random.default_rng(0), list[GgufTensor]()
    for parameter, tensor in model.state_dict().items():
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = (generator.standard_normal(tuple(tensor.shape)) * 0.1).astype(np.float32)
        order = row_order(config, parameter)
        if array.ndim == 1:
            array += 1.0 if "norm" in parameter else 0.0
            core: Any = array
        else:
            form = CoreFormat.parse(fmt)
            core = rtn.quantize(array, form, None) if form.quantised else array.astype(f"f{form.bits // 8}")
        tensors.append(tensor_of(names.of(parameter), core if order is None else take_rows(core, order)))
    if (divisors := rope_divisors(config)) is not None:
        tensors.append(tensor_of(ROPE_FREQS, divisors))
    write_gguf(path, values, tensors)
    return path


class Reference:
    """llama.cpp itself, at the settings that edgec's runtime is set to."""

    def __init__(self, path: Path, *, flash: bool, pack: bool, cache: int = library.F16) -> None:
        self.lib = lib = import_llama_cpp()
        if pack and uses_amx(lib):
            pytest.skip("this llama-cpp-python was compiled with AMX, so llama.cpp is not let repack")
        params = model_params(lib)
        params.use_extra_bufts = pack
        self.model = lib.llama_model_load_from_file(str(path).encode(), params)
        assert self.model
        settings = lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = 1
        settings.flash_attn_type = int(flash)
        settings.type_k = settings.type_v = cache
        self.context = lib.llama_init_from_model(self.model, settings)
        assert self.context
        self.position = 0

    def logits(self, ids: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Of every one of the tokens, which follow those of the last call."""
        lib, count = self.lib, len(ids)
        batch = lib.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, self.position + i, 1, 1
            batch.seq_id[i][0] = 0
        assert lib.llama_decode(self.context, batch) == 0
        found = np.ctypeslib.as_array(lib.llama_get_logits(self.context), (count, SIZES["vocab_size"])).copy()
        lib.llama_batch_free(batch)
        self.position += count
        return found

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


def ids_of(count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(1).integers(0, SIZES["vocab_size"], count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("gguf")


def dense(folder: Path, family: str, fmt: str) -> Path:
    path = folder / f"{family.replace(' ', '-')}-{fmt}.gguf"
    return path if path.exists() else write_random(path, family, fmt)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_llama_cpps_bit_for_bit(folder: Path, family: str, flash: bool) -> None:
    path = dense(folder, family, "int4-b32")
    ids = ids_of(40)
    model = GgmlModel(path, RuntimeOptions(threads=1), flash=flash)
    theirs = Reference(path, flash=flash, pack=True)
    np.testing.assert_array_equal(model.logits(np.array(ids)), theirs.logits(ids))
    for token in ids[:4]:
        np.testing.assert_array_equal(model.session.step(token), theirs.logits([token])[0])
    theirs.close()


@pytest.mark.parametrize("fmt", ["int8-b32", "fp16", "fp32"])
@pytest.mark.parametrize("pack", [True, False])
def test_the_same_in_other_formats(folder: Path, fmt: str, pack: bool) -> None:
    path = dense(folder, "qwen3", fmt)
    ids = ids_of(20)
    theirs = Reference(path, flash=True, pack=pack)
    model = GgmlModel(path, RuntimeOptions(threads=1), pack=pack)
    np.testing.assert_array_equal(model.logits(np.array(ids)), theirs.logits(ids))
    theirs.close()


def test_the_same_with_a_cache_of_q8_0(folder: Path) -> None:
    path = dense(folder, "llama", "int8-b32")
    ids = ids_of(30)
    theirs = Reference(path, flash=True, pack=True, cache=library.Q8_0)
    model = GgmlModel(path, RuntimeOptions(threads=1), cache="q8_0")
    ours, expected = model.logits(np.array(ids)), theirs.logits(ids)
    theirs.close()
    # llama.cpp turns keys and queries by a Hadamard matrix before it rounds them; edgec rounds them as they are
    assert np.abs(ours - expected).max() < 0.05 * np.abs(expected).max()
    half = GgmlModel(path, RuntimeOptions(threads=1)).logits(np.array(ids))
    assert np.abs(ours - half).max() > 0


@pytest.mark.parametrize("flash", [True, False])
def test_chunks_buckets_and_steps_agree(folder: Path, flash: bool) -> None:
    """Across two bucket borders, in a window: whole, in chunks, and token by token."""
    path = dense(folder, "gemma2", "fp32")
    ids = ids_of(530)
    model = GgmlModel(path, RuntimeOptions(threads=1), flash=flash, cache="f16", chunk=100)
    whole = model.logits(np.array(ids))
    model.session.start(len(ids))
    last = model.session.prefill(ids[:250]).copy()
    np.testing.assert_allclose(last, whole[249], atol=2e-3 * np.abs(whole).max())
    for position in range(250, len(ids)):
        stepped = model.session.step(ids[position])
        if position in (250, 255, 256, 257, 300, 511, 512, 513, 529):
            np.testing.assert_allclose(stepped, whole[position], atol=2e-3 * np.abs(whole).max())


def test_generation_sampling_and_forced_tokens(folder: Path) -> None:
    path = write_random(folder / "ends.gguf", "llama", "fp32", **{"tokenizer.ggml.eos_token_id": 5})
    model = GgmlModel(path, RuntimeOptions(threads=1))
    greedy = [piece.token for piece in model.generate([7, 8, 9], 12)]
    forced = list(model.forced([7, 8, 9], 12))
    assert len(forced) == 12 and 5 not in forced
    assert greedy == forced[: len(greedy)]
    draws = [[p.token for p in model.generate([7, 8], 8, greedy=False, random_seed=s, top_k=20)] for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert [p.token for p in model.generate([7, 8, 9], 5, greedy=False, top_k=1)] == greedy[:5]
    with pytest.raises(UsageError, match="unknown sampling option 'heat'"):
        list(model.generate([7], 1, greedy=False, heat=2))


def test_the_end_of_text_ends_a_text(folder: Path) -> None:
    path = dense(folder, "llama", "fp32")
    second = list(GgmlModel(path, RuntimeOptions(threads=1)).forced([7, 8, 9], 2))[1]
    ending = write_random(folder / "ending.gguf", "llama", "fp32", **{"tokenizer.ggml.eos_token_id": second})
    model = GgmlModel(ending, RuntimeOptions(threads=1))
    assert len(list(model.generate([7, 8, 9], 12))) == 1
    assert second not in list(model.forced([7, 8, 9], 12))


@pytest.mark.parametrize(
    ("ids", "new", "message"),
    [([], 1, "empty"), ([96], 1, "outside the vocabulary"), ([-1], 1, "outside"), ([1] * 640, 1, "do not fit")],
)
def test_prompts_that_ggml_would_crash_on(folder: Path, ids: list[int], new: int, message: str) -> None:
    model = GgmlModel(dense(folder, "llama", "fp32"), RuntimeOptions(threads=1))
    with pytest.raises(UsageError, match=message):
        next(model.forced(ids, new))


def test_not_a_number_is_told(folder: Path) -> None:
    path = folder / "nan.gguf"
    write_random(path, "llama", "fp32")
    raw = bytearray(path.read_bytes())
    raw[-2000:] = np.full(500, np.nan, "<f4").tobytes()
    path.write_bytes(raw)
    with pytest.raises(NumericsError):
        GgmlModel(path, RuntimeOptions(threads=1)).logits(np.array(ids_of(5)))


@pytest.mark.parametrize("greedy", [True, False])
def test_not_a_number_in_the_midst_of_a_text_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, greedy: bool
) -> None:
    model = GgmlModel(write_random(folder / "sound.gguf", "llama", "fp32"), RuntimeOptions(threads=1))
    monkeypatch.setattr(model.session, "step", lambda token: np.full(model.vocab_size, np.nan, np.float32))
    with pytest.raises(NumericsError):
        list(model.generate([7, 8], 3, greedy=greedy))


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, UnsupportedModelError, "yarn"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, CheckpointError, "epsilon of -1"),
        ({"llama.rope.freq_base": 0.0}, CheckpointError, "base 0"),
        ({"llama.rope.scaling.factor": -2.0}, CheckpointError, "scaling by -2"),
        ({"llama.expert_count": 8}, UnsupportedModelError, "mixture"),
        ({"llama.attention.head_count": 3}, UnsupportedModelError, "3 heads"),
        ({"llama.feed_forward_length": 64}, CheckpointError, r"expected \[64, 64\]"),
        ({"llama.block_count": 3}, CheckpointError, "blk.2.attn_norm|blk.2.attn_q"),
        ({"llama.rope.dimension_count": 16}, UnsupportedModelError, "rope.dimension_count"),
        ({"llama.attention.head_count_kv": 4}, CheckpointError, "attn_k.weight"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, CheckpointError, "2 tokens, a table of 96"),
    ],
)
def test_metadata_that_contradict_the_tensors(
    folder: Path, metadata: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = write_random(folder / "odd.gguf", "llama", "fp32", **metadata)
    with pytest.raises(error, match=message):
        GgmlModel(path, RuntimeOptions(threads=1))


def test_one_text_at_a_time(folder: Path) -> None:
    """The cache is of one text: who goes on with an older one must not get tokens of the newer."""
    model = GgmlModel(dense(folder, "llama", "fp32"), RuntimeOptions(threads=1))
    first = model.forced(ids_of(5), 4)
    next(first)
    model.logits(np.array(ids_of(9)))
    with pytest.raises(UsageError, match="another text was begun"):
        next(first)


def test_settings_that_cannot_be_meant(folder: Path) -> None:
    path = dense(folder, "llama", "fp32")
    for settings in ({"cache": "q4"}, {"cache": "q8_0", "flash": False}, {"chunk": 0}):
        with pytest.raises(UsageError):
            GgmlModel(path, RuntimeOptions(threads=1), **settings)
    with pytest.raises(RuntimeUnavailableError, match="asked for number 63"):
        GgmlModel(path, RuntimeOptions(threads=1, gpu=63))


def test_the_struct_that_is_read_is_smaller_than_ggmls() -> None:
    assert ctypes.sizeof(library.TensorHead) < library.library().tensor_overhead()


@pytest.mark.parametrize("length", [1, 101, 201])
def test_a_last_chunk_of_one_token_has_its_logits(folder: Path, length: int) -> None:
    """A single row is computed in memory of the session's, from where it has to be copied."""
    ids = np.array(ids_of(202))
    model = GgmlModel(dense(folder, "llama", "fp32"), RuntimeOptions(threads=1), chunk=100)
    whole = model.logits(ids)
    model.logits(ids[5:9])  # what an earlier run left in memory
    np.testing.assert_allclose(model.logits(ids[:length])[-1], whole[length - 1], atol=2e-3 * np.abs(whole).max())
