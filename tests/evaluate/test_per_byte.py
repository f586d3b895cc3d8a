"""Bits per byte: the same text costs the same, however it is cut into tokens."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgec.errors import CalibrationError
from edgec.evaluate.per_byte import bits_per_byte, pieces


def tokenizer(width: int, **ids: int | None) -> Any:
    """`width` letters to a token, numbered by the first of them."""

    def encode(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(text[i]) % 64 for i in range(0, len(text), width)]}

    class Tokenizer(SimpleNamespace):
        __call__ = staticmethod(encode)

    return Tokenizer(**{"bos_token_id": None, "eos_token_id": None, **ids})


def test_an_even_guess_costs_the_vocabulary_s_bits_for_each_token() -> None:
    seen: list[NDArray[np.int64]] = []

    def even(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        seen.append(ids)
        return np.zeros((len(ids), 64), np.float32)

    texts = ["abcdefgh", "xy"]
    assert bits_per_byte(even, tokenizer(1, bos_token_id=7), texts, 100) == pytest.approx(6)
    assert [int(ids[0]) for ids in seen] == [7, 7]
    assert bits_per_byte(even, tokenizer(2, eos_token_id=9), texts, 100) == pytest.approx(3)
    assert int(seen[-1][0]) == 9
    assert bits_per_byte(even, tokenizer(2), ["é" * 4], 100) == pytest.approx(6 * 2 / 8)  # bytes, not letters


def test_a_text_longer_than_the_context_is_predicted_in_parts() -> None:
    seen: list[int] = []

    def even(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        seen.append(len(ids))
        return np.zeros((len(ids), 64), np.float32)

    assert bits_per_byte(even, tokenizer(1), ["abcdefg"], 4) == pytest.approx(6)
    assert seen == [4, 4, 2]


def test_a_sure_and_right_model_costs_nothing_and_a_wrong_number_shows() -> None:
    def sure(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        found = np.full((len(ids), 64), -1e4, np.float32)
        found[np.arange(len(ids) - 1), ids[1:]] = 1e4
        return found

    assert bits_per_byte(sure, tokenizer(1), ["abc"], 10) == 0
    assert math.isnan(bits_per_byte(lambda ids: sure(ids) * np.nan, tokenizer(1), ["abc"], 10))


def test_pieces_are_the_beginnings_of_items_up_to_a_size() -> None:
    assert pieces(["a" * 3000, "b", "c" * 1000], most=1500) == ("a" * 1000, "b")
    with pytest.raises(CalibrationError, match="no text"):
        pieces([])
