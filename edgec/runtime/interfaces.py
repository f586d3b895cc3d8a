"""What every loaded artifact can do, whichever runtime executes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

ENCODER = "encoder"
CAUSAL_LM = "causal-lm"


@dataclass(frozen=True)
class Piece:
    """One generated token and the text that it adds ("" inside a multi-byte character)."""

    token: int
    text: str


class Encoder(Protocol):
    """A sentence encoder."""

    folder: Path
    runtime: str
    task: str  # ENCODER

    def embed(self, sentences: Sequence[str], batch_size: int = 32) -> Floats:
        """N sentences → [N, d] float32; truncated at the model's own maximum."""
        ...

    def token_count(self, sentences: Sequence[str]) -> int:
        """Tokens of all sentences after truncation, without padding."""
        ...


class CausalLM(Protocol):
    """A text generator."""

    folder: Path
    runtime: str
    task: str  # CAUSAL_LM
    vocab_size: int
    context_length: int

    def generate(
        self, prompt: str | Sequence[int], max_new_tokens: int = 128, greedy: bool = True, **sampling: Any
    ) -> Iterator[Piece]:
        """Streams the continuation; stops at end of text, at `max_new_tokens` or when the context is full."""
        ...

    def forced(self, ids: Sequence[int], new_tokens: int) -> Iterator[int]:
        """Exactly `new_tokens` greedy tokens, end of text suppressed: prefill before the first, one step per other."""
        ...

    @property
    def ends(self) -> Sequence[int]:
        """The tokens that `forced` suppresses."""
        ...

    def logits(self, ids: Ids) -> Floats:
        """Token ids [1, T] (or [T]) → logits [T, V] float32 of every position."""
        ...
