"""Bits per byte of text: the one figure that language models with different tokenizers share.

KL and top-1 agreement compare distributions over the same tokens, and perplexity is per token: neither means anything
between two vocabularies. Bytes are the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.errors import CalibrationError

TEXT_BYTES = 32_768
"""Most text that is measured on [bytes]; about as much as other figures of quality."""
_PIECE = 1_000
"""Characters that are predicted from nothing before them but the start of a text."""


def pieces(items: Sequence[str], most: int = TEXT_BYTES) -> tuple[str, ...]:
    """Texts of at most 1,000 characters from the start of every item, up to `most` bytes. Raises CalibrationError."""
    found: list[str] = []
    size = 0
    for item in items:
        piece = item[:_PIECE]
        size += len(piece.encode())
        if size > most:
            break
        found.append(piece)
    if not found:
        raise CalibrationError("there is no text to measure bits per byte on")
    return tuple(found)


def bits_per_byte(
    logits: Callable[[NDArray[np.int64]], NDArray[np.float32]], tokenizer: Any, texts: Sequence[str], context: int
) -> float:
    """−log₂ p(texts) ÷ their UTF-8 bytes. logits: ids [T] → [T, V]. context: tokens that the model takes at once.

    Every text starts after the tokenizer's beginning (or, without one, end) of text, so that its first token is
    predicted too. A text longer than the context is predicted in parts. NaN where a logit is not finite.
    """
    start = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    nats, size = 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        size += len(text.encode())
        for at in range(0, len(ids), context - 1):
            part = np.array([start, *ids[at : at + context - 1]], np.int64)
            scores = logits(part)[:-1].astype(np.float64)
            top = scores.max(axis=1, keepdims=True)
            total = top[:, 0] + np.log(np.exp(scores - top).sum(axis=1))
            nats += float((total - scores[np.arange(len(part) - 1), part[1:]]).sum())
    return nats / math.log(2) / size
