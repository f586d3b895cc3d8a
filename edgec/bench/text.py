"""The sentences that encoders are timed on: made from a fixed list, so that they are the same everywhere."""

from __future__ import annotations

import random

_TEXT = (
    "the model reads a short text and returns one vector for every sentence that it was given while another process "
    "writes small files to the disk and waits until the network answers again because the user asked for results in "
    "order of time and memory is never free on a phone or in a car where heat and power limit what can be done at once"
)
_WORDS = tuple(_TEXT.split())


def sentences(count: int, words: int, seed: int = 0) -> tuple[str, ...]:
    """`count` different sentences of exactly `words` common English words (about as many tokens)."""
    chooser = random.Random(seed)  # noqa: S311 - reproducible, not secret
    return tuple(" ".join(chooser.choice(_WORDS) for _ in range(words)).capitalize() + "." for _ in range(count))
