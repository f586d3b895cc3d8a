"""ggml's types as core formats: names, exact sizes with and without the library, fallbacks that are said."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgec.errors import PlanError
from edgec.fit import fit, stored_bytes
from edgec.moments import SecondMoment
from edgec.quantize.formats import CoreFormat, LayerFormat, PairFormat
from edgec.quantize.ggml_formats import TYPES, GgmlFormat, GgmlTensor, real_type
from edgec.records import Spec

NAMES = [name.lower() for name in TYPES]


@pytest.mark.parametrize("name", NAMES)
def test_names_round_trip(name: str) -> None:
    fmt = LayerFormat.parse(name)
    assert isinstance(fmt, GgmlFormat)
    assert str(fmt) == name
    assert fmt.quantised
    assert not fmt.simulated
    assert fmt.bits == int(next(c for c in name if c.isdigit()))


@pytest.mark.parametrize("name", ["Q4_K", "q9_k", "q4_k_m", "iq1_s", "q4k", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(PlanError, match="unknown core format"):
        LayerFormat.parse(name)


def test_a_pair_may_have_a_ggml_backbone() -> None:
    fmt = LayerFormat.parse("q3_k+int8-b32")
    assert isinstance(fmt, PairFormat)
    assert str(fmt) == "q3_k+int8-b32"
    assert fmt.of("core1") == CoreFormat(8, 32)
    shape = (64, 256)
    assert stored_bytes(Spec("residual", (32,)), shape, "linear", fmt) == 64 * 110 + (32 * 256 + 64 * 32) * 34 // 32


@given(width=st.integers(1, 2000), name=st.sampled_from(NAMES))
def test_the_real_type_always_divides_the_row(width: int, name: str) -> None:
    fmt = GgmlFormat.named(name)
    assert fmt is not None
    real = real_type(fmt.kind, width)
    assert fmt.divides(width) == (real == fmt.kind)
    least = {"F16": 16.0}.get(real, 2.0)
    assert 8 * fmt.stored_bytes((3, width)) / (3 * width) >= least


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [256, 96, 50])
def test_sizes_are_those_of_the_blocks_that_are_made(name: str, width: int, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra edgec[gguf]")
    random = np.random.default_rng(0)
    weight = random.standard_normal((16, width)).astype(np.float32)
    fmt = CoreFormat.parse(name)
    with caplog.at_level(logging.WARNING):
        core = fit(weight, Spec("dense"), fmt, moment=SecondMoment(np.eye(width))).cores["weight"]
    assert isinstance(core, GgmlTensor)
    assert core.stored_bytes == core.codes.nbytes == fmt.stored_bytes((16, width))
    error = float(((core.dequantize() - weight) ** 2).mean())
    assert error < (0.25 if fmt.bits == 2 else 0.08)
    changed = core.kind != name.upper()
    assert ("do not divide" in caplog.text) == changed
    if changed:
        assert f"stored as {core.kind}" in caplog.text
        assert f"{8 * core.stored_bytes / weight.size:.4g} bits per weight" in caplog.text


def test_importance_reaches_the_quantizer() -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra edgec[gguf]")
    random = np.random.default_rng(1)
    weight = random.standard_normal((32, 256)).astype(np.float32)
    importance = np.where(np.arange(256) % 2, 10.0, 0.01)

    def error(moment: SecondMoment | None) -> float:
        found = fit(weight, Spec("dense"), CoreFormat.parse("q2_k"), moment=moment).dense()
        return float(((weight - found) ** 2 @ importance).sum())

    assert error(SecondMoment(np.diag(importance))) < 0.8 * error(None)


def test_types_that_need_importance_get_it_without_activations() -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra edgec[gguf]")
    weight: Any = np.random.default_rng(2).standard_normal((8, 256))
    assert np.isfinite(fit(weight, Spec("dense"), CoreFormat.parse("iq2_xxs")).dense()).all()


def test_bytes_of_another_shape_are_refused() -> None:
    fmt = GgmlFormat.named("q4_k")
    assert fmt is not None
    with pytest.raises(PlanError, match="does not hold"):
        GgmlTensor.of(fmt, (4, 256), np.zeros((4, 143), np.uint8))
