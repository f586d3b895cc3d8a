"""What a caller asks of a generator, checked alike for every runtime: they would answer nonsense by a crash or garbage.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from edgec.errors import UsageError

SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "random_seed": 0}
"""Options of sampling and what they are where nobody says; `top_k` 0 is off."""


def check_sampling(options: Collection[str]) -> None:
    """Raises UsageError for a name that no runtime knows."""
    if unknown := sorted(set(options) - set(SAMPLING)):
        raise UsageError(f"unknown sampling option {unknown[0]!r}; known: {', '.join(sorted(SAMPLING))}")


def check_prompt(ids: Sequence[int], new_tokens: int, context_length: int, vocab_size: int, *, least: int = 0) -> None:
    """Raises UsageError for an empty prompt, fewer than `least` new tokens, more than the context holds, and ids
    outside the vocabulary.
    """
    if not ids:
        raise UsageError("the prompt is empty; give at least one token")
    if new_tokens < least or len(ids) + new_tokens > context_length:
        raise UsageError(
            f"{len(ids)} prompt tokens and {new_tokens} new ones do not fit the context of {context_length}"
        )
    if bad := [i for i in ids if not 0 <= i < vocab_size]:
        raise UsageError(f"token id {bad[0]} is outside the vocabulary of {vocab_size}")


def require_same_run(now: int, begun: int) -> None:
    """A model with one context serves one text at a time. Raises UsageError where another was begun since."""
    if now != begun:
        raise UsageError("another text was begun on this model meanwhile; finish one at a time, or load it twice")
