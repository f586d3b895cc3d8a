"""Causal LMs on llama.cpp: any .gguf file, or a folder with `model.gguf` and perhaps `adapter.gguf`, a LoRA left
un-merged.

llama-cpp-python's C interface is driven directly: its `Llama` class keeps the logits of the whole context
(vocabulary × context floats) and silences llama.cpp by redirecting the process's own stderr. Vocabularies and sampling
are llama.cpp's; the file's header is checked by edgec first, whatever the file claims.
"""

from __future__ import annotations

import codecs
import ctypes
import logging
import math
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgec.errors import CheckpointError, NumericsError, RuntimeUnavailableError, UsageError
from edgec.gguf_header import GgufHeader, read_header
from edgec.runtime.interfaces import CAUSAL_LM, Floats, Ids, Piece
from edgec.runtime.layout import gguf_file
from edgec.runtime.llama_opening import open_model
from edgec.runtime.options import RuntimeOptions
from edgec.runtime.prompts import SAMPLING, check_prompt, check_sampling, require_same_run

logger = logging.getLogger(__name__)

PLUGIN = True
_TOKENS, _MODEL = "tokenizer.ggml.tokens", "tokenizer.ggml.model"
_SPACE = "\u2581"
"""What SentencePiece puts in place of a space, and before a text."""
_MODELS = ("llama", "gpt2", "gemma4", "none", "no_vocab")
"""Kinds of vocabularies that causal LMs have: SentencePiece's, byte pairs, and no vocabulary."""
MODEL_FILE = "model.gguf"
ADAPTER_FILE = "adapter.gguf"

_BATCH = 512
"""Most tokens in one call of the prefill [tokens]; llama.cpp's own default for its physical batch."""
_LOGITS_CHUNK = 128
"""Tokens whose logits are kept at once [tokens]: a large vocabulary's would not fit for all."""

_LEVELS = {3: logging.INFO, 4: logging.WARNING}
"""ggml's levels of warnings and errors; everything else is for debugging."""


def claims(folder: Path) -> bool:
    return (folder / MODEL_FILE).is_file() or gguf_file(folder, factored=False)


def prepare() -> dict[str, str]:
    return {"llama-cpp-python": str(import_llama_cpp().__version__)}


def load(folder: Path, options: RuntimeOptions) -> LlamaCpp:
    return LlamaCpp(folder, options)


@cache
def import_llama_cpp() -> Any:
    """The llama_cpp module, its log turned over to `logging`. Raises RuntimeUnavailableError."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeUnavailableError(
            f"llama-cpp-python cannot be imported ({error}); pip install 'edgec[gguf]' (it compiles for some minutes)"
        ) from error
    llama_cpp.llama_log_set(_log_callback(llama_cpp), None)
    llama_cpp.llama_backend_init()
    return llama_cpp


@cache
def _log_callback(llama_cpp: Any) -> Any:
    """Kept alive by the cache: llama.cpp calls it for as long as the process lives."""

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, _: Any) -> None:
        logger.log(_LEVELS.get(level, logging.DEBUG), "%s", text.decode("utf-8", "replace").rstrip())

    return log


class Vocabulary:
    """The tokenizer inside a GGUF file, as llama.cpp reads it. Needs no weights (`vocab_only`)."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError when the file's header is unsound or llama.cpp refuses its vocabulary."""
        self._header = read_header(path)
        require_sound_vocabulary(self._header)
        self._lib = import_llama_cpp()
        model = open_model(self._lib, path, vocab_only=True)
        self._close = weakref.finalize(self, self._lib.llama_model_free, model)
        self._vocab = self._lib.llama_model_get_vocab(model)

    @classmethod
    def of_model(cls, lib: Any, model: Any, header: GgufHeader) -> Vocabulary:
        """The vocabulary of a model that is already open; it must outlive this object. header: of its file."""
        self = cls.__new__(cls)
        self._lib, self._vocab, self._header = lib, lib.llama_model_get_vocab(model), header
        return self

    @property
    def there(self) -> bool:
        """Does the file hold a vocabulary at all? llama.cpp ends the process when one that is not there is asked."""
        return bool(self._lib.llama_vocab_type(self._vocab) != self._lib.LLAMA_VOCAB_TYPE_NONE)

    @property
    def size(self) -> int:
        return int(self._lib.llama_vocab_n_tokens(self._vocab))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; special: add what the file says (the beginning of text) and read special tokens in the text."""
        if not self.there:
            raise CheckpointError("this GGUF has no vocabulary; give token ids instead of text")
        if fault := self._fault or self._unreadable(text):
            raise CheckpointError(f"{self._header.path}: {fault}; give token ids instead of text")
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 8
        ids = (self._lib.llama_token * room)()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, room, special, special)
        if count < 0:
            raise CheckpointError(f"llama.cpp makes {-count} tokens of {len(raw)} bytes of text; its vocabulary is odd")
        return [int(i) for i in ids[:count]]

    @cached_property
    def _fault(self) -> str:
        """What llama.cpp would end the process for when it reads a text; "" for a sound vocabulary."""
        lib, vocab = self._lib, self._vocab
        for what, wanted, token in (
            ("begins", lib.llama_vocab_get_add_bos, lib.llama_vocab_bos),
            ("ends", lib.llama_vocab_get_add_eos, lib.llama_vocab_eos),
        ):
            if wanted(vocab) and not 0 <= token(vocab) < self.size:
                return f"its vocabulary has no token that {what} a text, and says that every text has one"
        return ""

    @cached_property
    def _known(self) -> frozenset[str] | None:
        """The tokens of a vocabulary that falls back to bytes; None for another kind."""
        if self._header.metadata.get(_MODEL) != "llama":
            return None
        return frozenset(self._header.strings(_TOKENS))

    def _unreadable(self, text: str) -> str:
        """A character that is no token is taken apart, and llama.cpp ends the process where a byte is none either."""
        known = self._known
        if known is None:
            return ""
        for character in {_SPACE, *text.replace(" ", _SPACE)} - known:
            for byte in character.encode("utf-8", "replace"):
                if f"<0x{byte:02X}>" not in known and (byte > 127 or chr(byte) not in known):
                    return f"its vocabulary has no tokens for {character!r}, nor for its bytes"
        return ""

    def piece(self, token: int) -> bytes:
        """What a token adds to the text; nothing for a special one."""
        if not self.there:
            return b""
        if not 0 <= token < self.size:
            raise UsageError(f"token id {token} is outside the vocabulary of {self.size}")
        room = 256
        buffer = ctypes.create_string_buffer(room)
        count = self._lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = self._lib.llama_token_to_piece(self._vocab, token, buffer, -count, 0, False)
        return buffer.raw[: max(0, count)]

    def ends(self) -> list[int]:
        """Tokens that end a text."""
        is_end = self._lib.llama_vocab_is_eog
        return [token for token in range(self.size) if is_end(self._vocab, token)] if self.there else []


class LlamaCpp:
    """A generator with its tokenizer. Token ids are Python ints; logits are float32."""

    task = CAUSAL_LM
    runtime = "llama.cpp"

    def __init__(self, folder: Path | str, options: RuntimeOptions | None = None) -> None:
        """Loads a folder, or one .gguf file. Raises CheckpointError for unsound files, RuntimeUnavailableError."""
        self.folder = Path(folder)
        path = self.folder if self.folder.is_file() else self.folder / MODEL_FILE
        adapter = self.folder / ADAPTER_FILE
        header = read_header(path)
        require_sound_vocabulary(header)
        self._lib = import_llama_cpp()
        self._threads = (options or RuntimeOptions()).thread_count()
        self._cache = {"f16": self._lib.GGML_TYPE_F16, "q8_0": self._lib.GGML_TYPE_Q8_0}.get(
            (options or RuntimeOptions()).kv_cache
        )
        self._model = open_model(self._lib, path, gpu=(options or RuntimeOptions()).gpu)
        self._close = weakref.finalize(self, self._lib.llama_model_free, self._model)
        self.vocabulary = Vocabulary.of_model(self._lib, self._model, header)
        self._adapter = self._open_adapter(adapter) if adapter.is_file() else None
        table = header.tensors.get("token_embd.weight")
        if table is None:
            raise CheckpointError(f"{path} has no token_embd.weight; it is not a model that edgec wrote")
        self.vocab_size = table.shape[0]
        if self.vocabulary.size not in (0, self.vocab_size):
            raise CheckpointError(f"{path}: {self.vocabulary.size} tokens, {self.vocab_size} rows in the table")
        self.context_length = int(self._lib.llama_model_n_ctx_train(self._model))
        self._context: Any = None
        self._free_context: Any = None
        self._room = 0
        self._run = 0  # counts texts: a context may be cleared for the next, or freed for a larger one

    @cached_property
    def ends(self) -> list[int]:
        """llama.cpp is asked about every token, once, when somebody wants to know."""
        return self.vocabulary.ends()

    def encode(self, text: str) -> list[int]:
        return self.vocabulary.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.vocabulary.piece(int(i)) for i in ids).decode("utf-8", "replace")

    def generate(
        self, prompt: str | Sequence[int], max_new_tokens: int = 128, greedy: bool = True, **sampling: Any
    ) -> Iterator[Piece]:
        """Streams the continuation of a text or of token ids.

        sampling: temperature, top_k, top_p, repetition_penalty, random_seed; only read when `greedy` is False.
        """
        check_sampling(sampling)
        ids = self.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        check_prompt(ids, 1, self.context_length, self.vocab_size)
        new = min(max_new_tokens, self.context_length - len(ids))
        return self._stream(ids, new, None if greedy else sampling)

    def _stream(self, ids: list[int], new: int, sampling: dict[str, Any] | None) -> Iterator[Piece]:
        text = codecs.getincrementaldecoder("utf-8")("replace")
        chain = sampler_chain(self._lib, sampling, self.vocab_size)
        try:
            context, run = self._fresh_context(len(ids) + new), self._run
            self._prefill(context, ids)
            for position in range(len(ids), len(ids) + new):
                token = int(self._lib.llama_sampler_sample(chain, context, -1))
                if token in self.ends:
                    return
                yield Piece(token, text.decode(self.vocabulary.piece(token)))
                require_same_run(self._run, run)
                if position + 1 < len(ids) + new:
                    self._decode(context, [token])
        finally:
            self._lib.llama_sampler_free(chain)

    def forced(self, ids: Sequence[int], new_tokens: int) -> Iterator[int]:
        """Exactly `new_tokens` greedy tokens after `ids`, the end of text suppressed.

        The first token comes after the prefill, each other after one decode step.
        """
        flat = [int(i) for i in ids]
        check_prompt(flat, new_tokens, self.context_length, self.vocab_size)
        context, run = self._fresh_context(len(flat) + new_tokens), self._run
        self._prefill(context, flat)
        for done in range(new_tokens):
            values = self._last_logits(context, 1)[0]
            values[self.ends] = -np.inf
            token = int(values.argmax())
            yield token
            require_same_run(self._run, run)
            if done + 1 < new_tokens:
                self._decode(context, [token])

    def logits(self, ids: Ids) -> Floats:
        """Token ids [1, T] or [T] → logits [T, V] float32 of every position."""
        return np.concatenate(list(self.logits_chunks(ids)))

    def logits_chunks(self, ids: Ids, chunk: int = _LOGITS_CHUNK) -> Iterator[Floats]:
        """The same as an iterator of [≤ chunk, V], for vocabularies whose full [T, V] would not fit in memory."""
        flat = [int(i) for i in np.asarray(ids).reshape(-1)]
        check_prompt(flat, 0, self.context_length, self.vocab_size)
        context, run = self._fresh_context(len(flat)), self._run
        for start in range(0, len(flat), chunk):
            part = flat[start : start + chunk]
            self._decode(context, part, every=True)
            values = self._last_logits(context, len(part)).copy()
            if not np.isfinite(values).all():
                raise NumericsError(f"{self.folder} answered NaN or Inf at position {start} or later")
            yield values
            require_same_run(self._run, run)

    def _prefill(self, context: Any, ids: list[int]) -> None:
        for start in range(0, len(ids), _BATCH):
            self._decode(context, ids[start : start + _BATCH])

    def _decode(self, context: Any, ids: list[int], *, every: bool = False) -> None:
        """Append tokens to the context; logits of the last one, or of `every` one."""
        tokens = (self._lib.llama_token * len(ids))(*ids)
        batch = self._lib.llama_batch_get_one(tokens, len(ids))
        if every:
            keep = _every_output(batch)
        status = self._lib.llama_decode(context, batch)
        if every:
            del keep
        if status != 0:
            raise NumericsError(f"llama.cpp could not decode {len(ids)} tokens of {self.folder} (status {status})")

    def _last_logits(self, context: Any, rows: int) -> Floats:
        """Logits [rows, V] of the last call, a view that the next call overwrites."""
        pointer = self._lib.llama_get_logits(context)
        return np.ctypeslib.as_array(pointer, (rows, self.vocab_size))

    def _fresh_context(self, total: int) -> Any:
        """An empty context with room for `total` tokens; the last one when it is of the right size, cleared."""
        self._run += 1
        if self._context is None or not total <= self._room <= max(2 * total, 512):
            if self._free_context is not None:
                self._free_context()
            params = self._lib.llama_context_default_params()
            params.n_ctx = self._room = -(-total // 256) * 256
            params.n_batch = params.n_ubatch = min(_BATCH, self._room)
            params.n_threads = params.n_threads_batch = self._threads
            params.n_outputs_max = min(_BATCH, self._room)
            params.no_perf = True
            if self._cache is not None:
                params.type_k = params.type_v = self._cache
            self._context = self._lib.llama_init_from_model(self._model, params)
            if not self._context:
                what = f"a context of {self._room} tokens"
                if self._cache == self._lib.GGML_TYPE_Q8_0:
                    what += " with a q8_0 cache (it needs heads of a multiple of 32 numbers)"
                raise CheckpointError(f"llama.cpp cannot make {what} for {self.folder}")
            self._free_context = weakref.finalize(self, self._lib.llama_free, self._context)
            if self._adapter is not None:
                adapters = (self._lib.llama_adapter_lora_p_ctypes * 1)(self._adapter)
                if self._lib.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(1.0)):
                    self._context = None  # or the next call would run without the adapter
                    raise CheckpointError(f"llama.cpp refuses the adapter of {self.folder}")
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        return self._context

    def _open_adapter(self, path: Path) -> Any:
        read_header(path)
        adapter = self._lib.llama_adapter_lora_init(self._model, str(path).encode())
        if not adapter:
            raise CheckpointError(f"llama.cpp cannot load the adapter {path}; --debug shows its reasons")
        return adapter  # freed with the model


def require_sound_vocabulary(header: GgufHeader) -> None:
    """llama.cpp ends the process for tokens that are the same to it, and for what some kinds of vocabulary lack.
    Raises CheckpointError.
    """
    model = header.metadata.get(_MODEL, "none")
    if model not in _MODELS:
        known = ", ".join(_MODELS)
        raise CheckpointError(f"{header.path}: a vocabulary of kind {str(model)[:40]!r}; edgec reads {known}")
    if _TOKENS not in header.metadata:
        return
    tokens = [token or f"[EMPTY_{place}]" for place, token in enumerate(header.strings(_TOKENS))]
    if any("\0" in token for token in tokens):
        raise CheckpointError(f"{header.path}: a token of its vocabulary holds a NUL, at which llama.cpp would cut it")
    if len(set(tokens)) < len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise CheckpointError(f"{header.path}: its vocabulary holds the token {twice[:40]!r} twice")


def sampler_chain(lib: Any, sampling: dict[str, Any] | None, vocab_size: int) -> Any:
    """llama.cpp's own chain of samplers, to be freed by `llama_sampler_free`; None: the likeliest token."""
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    if sampling is None:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
        return chain
    found = {**SAMPLING, **sampling}
    for name in ("repetition_penalty", "top_p"):
        if not 0 < float(found[name]) < math.inf:
            lib.llama_sampler_free(chain)
            raise UsageError(f"{name} must be above 0, got {found[name]}")
    if found["repetition_penalty"] != 1.0:
        penalties = lib.llama_sampler_init_penalties(vocab_size, 64, float(found["repetition_penalty"]), 0.0, 0.0)
        lib.llama_sampler_chain_add(chain, penalties)
    if found["top_k"]:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_k(int(found["top_k"])))
    if found["top_p"] < 1.0:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_p(float(found["top_p"]), 1))
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(float(found["temperature"])))
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(int(found["random_seed"])))
    return chain


def _every_output(batch: Any) -> tuple[Any, ...]:
    """Ask for the logits of every token of the batch. Returns what must live until the call."""
    count = int(batch.n_tokens)
    wanted = (ctypes.c_int8 * count)(*[1] * count)
    batch.logits = wanted
    return (wanted,)
