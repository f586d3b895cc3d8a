"""llama.cpp's types: the fallback table without the library; the numbers against an independent reading with it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from edgec.errors import NumericsError, RuntimeUnavailableError
from edgec.export.targets import get_target
from edgec.moments import SecondMoment
from edgec.peers import ggml
from edgec.quantize.ggml_formats import real_type

TARGET = get_target("onnx-x64")


@pytest.fixture
def library() -> ggml.Ggml:
    try:
        return ggml.library()
    except RuntimeUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("wanted", "width", "real"),
    [
        ("Q4_K", 768, "Q4_K"),
        ("Q4_K", 384, "Q5_0"),
        ("Q5_K", 384, "Q5_1"),
        ("Q6_K", 384, "Q8_0"),
        ("Q3_K", 64, "Q4_0"),
        ("Q2_K", 64, "Q4_0"),
        ("IQ3_XXS", 384, "IQ4_NL"),
        ("IQ2_XXS", 256, "IQ2_XXS"),
        ("IQ2_XXS", 100, "F16"),
        ("Q8_0", 384, "Q8_0"),
        ("Q8_0", 100, "F16"),
    ],
)
def test_rows_that_do_not_fit_fall_back_as_in_llama_quantize(wanted: str, width: int, real: str) -> None:
    assert real_type(wanted, width) == real


def test_without_the_package_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    ggml.library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeUnavailableError, match="edgec\\[gguf\\]"):
        ggml.peers(TARGET, ())
    ggml.library.cache_clear()


def test_another_library_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "libggml-base.so"
    text.write_text("not a library")
    with pytest.raises(RuntimeUnavailableError, match="not a ggml library"):
        ggml.Ggml(text)
    if sys.platform == "linux":
        with pytest.raises(RuntimeUnavailableError, match="not a ggml library"):
            ggml.Ggml(Path("libc.so.6"))


def test_q8_0_is_read_as_its_definition_says(library: ggml.Ggml) -> None:
    """Blocks of 32: one fp16 scale max|w| / 127 and 32 signed bytes; the reference is written here, in numpy."""
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    codes = library.quantize(weight, "Q8_0", None)
    values = library.dequantize(codes, "Q8_0", (8, 64))
    assert codes.size == 8 * 2 * 34
    blocks = weight.reshape(8, 2, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    expected = np.round(blocks / scale) * scale.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(values.reshape(8, 2, 32), expected, atol=1e-6)


@pytest.mark.parametrize("name", ggml.TYPES)
def test_every_type_has_its_published_size_and_error_falls_with_bits(library: ggml.Ggml, name: str) -> None:
    published = {
        "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q4_K": 4.5, "IQ4_NL": 4.5, "IQ4_XS": 4.25, "Q4_0": 4.5,
        "Q3_K": 3.4375, "IQ3_S": 3.4375, "IQ3_XXS": 3.0625, "Q2_K": 2.625, "IQ2_S": 2.5625, "IQ2_XS": 2.3125,
        "IQ2_XXS": 2.0625,
    }  # fmt: skip
    random = np.random.default_rng(1)
    weight = random.standard_normal((16, 512)).astype(np.float32)
    codes = library.quantize(weight, name, np.ones(512, np.float32))
    values = library.dequantize(codes, name, (16, 512))
    bits = 8 * codes.size / weight.size
    assert bits == published[name]
    error = float(((weight - values) ** 2).mean())
    bound = 2.0 ** (-2 * bits)  # a Gaussian's rate–distortion bound
    assert bound < error < 3.2 * bound + 0.01


def test_the_slowest_types_are_for_the_smallest_budgets(library: ggml.Ggml) -> None:
    assert {p.name for p in ggml.peers(TARGET, (2.0, 1.5))} - {p.name for p in ggml.peers(TARGET, (2.0,))} == {
        "IQ1_M",
        "IQ1_S",
    }


def test_importance_moves_the_error_to_where_it_does_not_matter(library: ggml.Ggml) -> None:
    random = np.random.default_rng(2)
    weight = random.standard_normal((32, 256)).astype(np.float32)
    importance = np.where(np.arange(256) % 2, 10.0, 0.01).astype(np.float32)
    (peer,) = [p for p in ggml.peers(TARGET, ()) if p.name == "Q2_K"]
    plain = peer.replace(weight, None).factors.dense()
    weighed = peer.replace(weight, SecondMoment(np.diag(importance))).factors.dense()
    assert ((weight - weighed) ** 2 @ importance).sum() < 0.8 * ((weight - plain) ** 2 @ importance).sum()


def test_fallbacks_are_named_and_counted(library: ggml.Ggml) -> None:
    weight = np.random.default_rng(3).standard_normal((16, 96)).astype(np.float32)
    moment = SecondMoment(np.eye(96))
    made = {p.name: p.replace(weight, moment) for p in ggml.peers(TARGET, ())}
    assert {name: made[name].form for name in ("Q8_0", "Q4_K", "Q3_K", "IQ2_XXS")} == {
        "Q8_0": "Q8_0", "Q4_K": "Q4_K→Q5_0", "Q3_K": "Q3_K→Q4_0", "IQ2_XXS": "IQ2_XXS→IQ4_NL",
    }  # fmt: skip
    assert 8 * made["Q3_K"].bytes / weight.size == 4.5
    assert not made["Q3_K"].healable
    odd = ggml._peer(library, "Q4_K").replace(weight[:, :50], SecondMoment(np.eye(50)))
    assert (odd.form, odd.bytes) == ("Q4_K→F16", 2 * 16 * 50)
    np.testing.assert_allclose(odd.factors.dense(), weight[:, :50], rtol=1e-3)


def test_numbers_that_would_abort_the_process_are_refused(library: ggml.Ggml) -> None:
    weight = np.full((4, 256), np.nan, np.float32)
    with pytest.raises(NumericsError, match="NaN"):
        library.quantize(weight, "IQ2_XXS", np.ones(256, np.float32))
    dead = np.random.default_rng(4).standard_normal((4, 256)).astype(np.float32)
    peer = ggml._peer(library, "IQ2_XXS")
    for diagonal in (np.zeros(256), np.where(np.arange(256) < 8, 1.0, 0.0)):  # channels that never fire
        assert np.isfinite(peer.replace(dead, SecondMoment(np.diag(diagonal))).factors.dense()).all()
    assert np.isfinite(peer.replace(0 * dead, SecondMoment(np.eye(256))).factors.dense()).all()
    with pytest.raises(RuntimeUnavailableError, match="needs activations"):
        peer.replace(dead, None)
