"""A GGUF file that generates: edgec's factored ones, and dense ones of the same architectures to compare with.

Vocabulary and sampling are llama.cpp's own, through llama_cpp; the blocks are ours. At load a file that carries a
self-test is asked for the logits that its writer got, so that a device whose kernels are wrong says so at once.
"""

from __future__ import annotations

import codecs
import ctypes
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgec.errors import CheckpointError, NumericsError, UsageError, VerificationError
from edgec.gguf_header import GgufHeader, read_header
from edgec.runtime.ggml import MODEL_FILE
from edgec.runtime.ggml.network import SECONDS, read_network
from edgec.runtime.ggml.program import SELFTEST_IDS, SELFTEST_LOGITS, SELFTEST_TOKENS
from edgec.runtime.ggml.session import CHUNK, Session
from edgec.runtime.ggml.tensors import Device
from edgec.runtime.ggml.weights import Weights
from edgec.runtime.interfaces import CAUSAL_LM, Floats, Ids, Piece
from edgec.runtime.llama_cpp import Vocabulary, import_llama_cpp, sampler_chain
from edgec.runtime.options import RuntimeOptions
from edgec.runtime.prompts import check_prompt, check_sampling, require_same_run

logger = logging.getLogger(__name__)

_MOST_PROBE_IDS = 64
"""Longest self-test that is run at load [tokens]: a file must not be able to make it take hours."""
SELFTEST_TOLERANCE = 0.1
"""Largest RMS difference from the self-test's logits, as a share of their standard deviation. Kernels of other CPUs
round activations otherwise (0.01 was seen between packed and unpacked Q4_0); a weight in a wrong place gives 1."""

_ENDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


class GgmlModel:
    """A generator with its tokenizer. Token ids are Python ints; logits are float32."""

    task = CAUSAL_LM
    runtime = "ggml"

    def __init__(
        self,
        folder: Path | str,
        options: RuntimeOptions | None = None,
        *,
        flash: bool = True,
        cache: str = "f16",
        chunk: int = CHUNK,
        pack: bool = True,
        selftest: bool = True,
    ) -> None:
        """Loads a folder with `model.factored.gguf`, or one .gguf file.

        flash: flash attention; cache: "f16" or "q8_0"; chunk: most tokens of one prefill graph; pack: weights as the
        fastest kernels read them.
        Raises CheckpointError, UnsupportedModelError, RuntimeUnavailableError, VerificationError (the self-test).
        """
        self.folder = Path(folder)
        self.path = self.folder / MODEL_FILE if self.folder.is_dir() else self.folder
        header = read_header(self.path)
        network = read_network(header)
        options = options or RuntimeOptions()
        self.device = Device(options.thread_count(), options.gpu)
        bundles = {name: bundle.cores for name, bundle in network.bundles.items()}
        experts = {f"{name}{SECONDS}": bundle.seconds for name, bundle in network.bundles.items() if bundle.seconds}
        weights = Weights(self.device, header, network.uses(), bundles, experts, pack=pack)
        self.session = Session(
            self.device,
            network,
            weights,
            flash=flash,
            cache=options.kv_cache or cache,
            chunk=chunk,
        )
        self.vocab_size, self.context_length = network.config.vocab, network.config.context
        self.ends = [t for key in _ENDS if (t := _token(header, key, self.vocab_size)) is not None]
        self.has_vocabulary = "tokenizer.ggml.tokens" in header.metadata
        self._vocabulary: Vocabulary | None = None
        self._stops: frozenset[int] | None = None
        if selftest:
            self._test_itself(header)

    @property
    def vocabulary(self) -> Vocabulary:
        """llama.cpp's; opened on first use, because an export's self-test and parity need none."""
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self.path)
        return self._vocabulary

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
        sampler = _Sampler(self.vocab_size, sampling)
        if self._stops is None:  # llama.cpp is asked about every token, once
            self._stops = frozenset([*self.ends, *self.vocabulary.ends()])
        text = codecs.getincrementaldecoder("utf-8")("replace")
        self.session.start(len(ids) + new)
        run = self.session.run
        logits = self.session.prefill(ids)
        for done in range(new):
            token = sampler.choose(logits)
            if token in self._stops:
                return
            yield Piece(token, text.decode(self.vocabulary.piece(token)))
            require_same_run(self.session.run, run)
            if done + 1 < new:
                logits = self.session.step(token)

    def forced(self, ids: Sequence[int], new_tokens: int) -> Iterator[int]:
        """Exactly `new_tokens` greedy tokens after `ids`, the end of text suppressed.

        The first token comes after the prefill, each other after one decode step.
        """
        flat = [int(i) for i in ids]
        check_prompt(flat, new_tokens, self.context_length, self.vocab_size)
        self.session.start(len(flat) + new_tokens)
        run = self.session.run
        logits = self.session.prefill(flat)
        for done in range(new_tokens):
            logits[self.ends] = -np.inf
            token = int(logits.argmax())
            _finite(logits, token)
            yield token
            require_same_run(self.session.run, run)
            if done + 1 < new_tokens:
                logits = self.session.step(token)

    def logits(self, ids: Ids) -> Floats:
        """Token ids [1, T] or [T] → logits [T, V] float32 of every position."""
        return np.concatenate(list(self.logits_chunks(ids)))

    def logits_chunks(self, ids: Ids, chunk: int = CHUNK) -> Iterator[Floats]:
        """The same as an iterator of [≤ chunk, V], for vocabularies whose full [T, V] would not fit in memory."""
        flat = [int(i) for i in np.asarray(ids).reshape(-1)]
        check_prompt(flat, 0, self.context_length, self.vocab_size)
        if chunk < 1:
            raise UsageError(f"chunk must be at least 1 token, got {chunk}")
        self.session.start(len(flat))
        run = self.session.run
        for at in range(0, len(flat), chunk):
            require_same_run(self.session.run, run)
            yield self.session.every(flat[at : at + chunk])

    def _test_itself(self, header: GgufHeader) -> None:
        """Does this machine compute the logits that the file's writer got? Raises VerificationError."""
        if SELFTEST_IDS not in header.metadata:
            return
        ids, tokens = header.numbers(SELFTEST_IDS), header.numbers(SELFTEST_TOKENS)
        expected = header.numbers(SELFTEST_LOGITS).astype(np.float64)
        most = min(_MOST_PROBE_IDS, self.context_length)
        sound = len(ids) and len(tokens) == len(expected) > 1 and ids.dtype.kind == tokens.dtype.kind == "i"
        if not sound or min(tokens) < 0 or max(tokens) >= self.vocab_size or len(ids) > most:
            raise CheckpointError(f"{self.path}: the self-test in its metadata is malformed")
        try:
            found = self.logits(ids)[-1][tokens]
        except (NumericsError, UsageError) as error:
            raise VerificationError(f"{self.path}: the self-test failed: {error}") from error
        apart = float(np.sqrt(np.mean((found - expected) ** 2)) / (expected.std() + 1e-12))
        if not apart <= SELFTEST_TOLERANCE:
            raise VerificationError(
                f"{self.path}: logits differ by {apart:.3f} standard deviations from those of its writer, at most "
                f"{SELFTEST_TOLERANCE} is right; the file is damaged or this build of ggml is wrong here"
            )
        logger.debug("%s: self-test passed, %.2g standard deviations", self.path, apart)


def _finite(logits: Floats, token: int) -> None:
    """numpy's argmax finds a NaN where there is one, so a look at the winner is enough. Raises NumericsError."""
    if not np.isfinite(logits[token]):
        raise NumericsError("the model answered NaN or Inf; its file is damaged")


class _Sampler:
    """llama.cpp's sampler chain over logits that llama.cpp did not compute."""

    def __init__(self, vocab_size: int, sampling: dict[str, Any] | None) -> None:
        self._lib = lib = import_llama_cpp()
        self._greedy = sampling is None
        self._chain = None if sampling is None else sampler_chain(lib, sampling, vocab_size)
        self._data = np.zeros(vocab_size, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self._ids = np.arange(vocab_size, dtype=np.int32)

    def choose(self, logits: Floats) -> int:
        """The next token of logits [V]. Raises NumericsError."""
        best = int(logits.argmax())
        _finite(logits, best)
        if self._greedy:
            return best
        lib, data = self._lib, self._data
        data["id"], data["logit"], data["p"] = self._ids, logits, 0.0
        pointer = ctypes.cast(data.ctypes.data, lib.llama_token_data_p)
        candidates = lib.llama_token_data_array(pointer, len(data), -1, False)
        lib.llama_sampler_apply(self._chain, ctypes.byref(candidates))
        if not 0 <= candidates.selected < candidates.size:
            raise NumericsError("llama.cpp's samplers chose no token; check temperature, top_k and top_p")
        token = int(candidates.data[candidates.selected].id)
        lib.llama_sampler_accept(self._chain, token)
        return token

    def __del__(self) -> None:
        if getattr(self, "_chain", None) is not None:
            self._lib.llama_sampler_free(self._chain)


def _token(header: GgufHeader, key: str, vocab_size: int) -> int | None:
    value = header.metadata.get(key)
    return value if type(value) is int and 0 <= value < vocab_size else None
