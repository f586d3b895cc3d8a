"""edgec's cores as ggml's blocks: bit for bit, by gguf-py's dequantizers and by ggml's own."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgec.errors import ExportError
from edgec.export.artifacts.gguf import whole_core
from edgec.export.gguf.blocks import blocks, core_of, ggml_type
from edgec.fit import fit
from edgec.moments import SecondMoment
from edgec.quantize import descent, ggml, gptq, rtn
from edgec.quantize.formats import CoreFormat, QuantizedTensor
from edgec.records import Spec

gguf: Any = pytest.importorskip("gguf", reason="needs the extra edgec[gguf]")


def core(fmt: str, shape: tuple[int, int], seed: int = 0) -> QuantizedTensor:
    """Every code and many scales, negative ones too."""
    random = np.random.default_rng(seed)
    parsed = CoreFormat.parse(fmt)
    codes = random.integers(0, 1 << parsed.bits, shape, dtype=np.uint8)
    scales = random.standard_normal((shape[0], shape[1] // 32)).astype(np.float16)
    return QuantizedTensor(parsed, shape, codes, scales)


@pytest.mark.parametrize(("fmt", "kind"), [("int4-b32", "Q4_0"), ("int8-b32", "Q8_0")])
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 5), width=st.integers(1, 5))
def test_the_file_holds_exactly_the_numbers_of_the_core(fmt: str, kind: str, seed: int, rows: int, width: int) -> None:
    stored = core(fmt, (rows, 32 * width), seed)
    data = blocks(stored)
    assert ggml_type(stored) == kind
    assert data.dtype == np.uint8
    assert data.nbytes == stored.stored_bytes
    expected = stored.dequantize()
    number = gguf.GGMLQuantizationType[kind]
    np.testing.assert_array_equal(gguf.quants.dequantize(data, number), expected)
    np.testing.assert_array_equal(ggml.library().dequantize(data, kind, stored.shape), expected)
    back = core_of(data, kind, stored.shape)
    assert str(back.fmt) == fmt
    np.testing.assert_array_equal(back.codes, stored.codes)
    np.testing.assert_array_equal(back.scales, stored.scales)


@pytest.mark.parametrize("fmt", ["int4-b32", "int8-b32"])
def test_what_any_method_makes_ships_without_another_rounding(fmt: str) -> None:
    random = np.random.default_rng(1)
    weight, inputs = random.standard_normal((48, 96)), random.standard_normal((400, 96))
    moment = SecondMoment(inputs.T @ inputs / 400)
    for method in (descent, gptq, rtn):
        stored = method.quantize(weight, CoreFormat.parse(fmt), moment)
        values = ggml.library().dequantize(blocks(stored), ggml_type(stored), stored.shape)
        np.testing.assert_array_equal(values, stored.dequantize())


@pytest.mark.parametrize("fmt", ["int4-b64", "int2-b32", "int4-b32-zp", "int8-b16"])
def test_a_format_that_no_type_holds_exactly_is_refused(fmt: str) -> None:
    stored = rtn.quantize(np.random.default_rng(2).standard_normal((4, 64)), CoreFormat.parse(fmt))
    with pytest.raises(ExportError, match="holds exactly"):
        blocks(stored)


def test_rows_and_scales_that_do_not_fit_are_refused() -> None:
    narrow = rtn.quantize(np.random.default_rng(3).standard_normal((4, 40)), CoreFormat.parse("int4-b32"))
    tiny = rtn.quantize(1e-9 * np.random.default_rng(3).standard_normal((4, 64)), CoreFormat.parse("int4-b32"))
    assert tiny.scales.dtype == np.float32
    for stored in (narrow, tiny):
        with pytest.raises(ExportError, match="multiple of 32"):
            blocks(stored)


@pytest.mark.parametrize(("dtype", "kind"), [(np.float16, "F16"), (np.float32, "F32")])
def test_floats_stay_as_they_are(dtype: Any, kind: str) -> None:
    values = np.random.default_rng(4).standard_normal((3, 5)).astype(dtype)
    assert ggml_type(values) == kind
    np.testing.assert_array_equal(blocks(values), values)
    with pytest.raises(ExportError, match="float64"):
        ggml_type(values.astype(np.float64))


def test_a_matrix_that_no_type_holds_exactly_is_written_in_floats_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """Scales below fp16's normal range are stored as fp32, and Q4_0 has no such scales."""
    weight = 1e-9 * np.random.default_rng(5).standard_normal((8, 64))
    fitted = fit(weight, Spec("dense"), CoreFormat.parse("int4-b32"))
    with caplog.at_level(logging.WARNING):
        core = whole_core(fitted)
    assert "written in floats" in caplog.text
    assert isinstance(core, np.ndarray)
    np.testing.assert_array_equal(core, fitted.dense())


def test_a_factored_layer_is_multiplied_out() -> None:
    fitted = fit(np.random.default_rng(6).standard_normal((64, 96)), Spec("svd", (32,)), CoreFormat(32))
    np.testing.assert_allclose(np.asarray(whole_core(fitted), np.float32), fitted.dense(), rtol=1e-3, atol=1e-4)
