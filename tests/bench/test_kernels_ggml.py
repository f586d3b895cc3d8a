"""ggml's cost per weight, measured for real on one small shape."""

from __future__ import annotations

import pytest

pytest.importorskip("llama_cpp")

from edgec.bench import kernels_ggml
from edgec.quantize.ggml_formats import NUMBERS
from edgec.runtime.ggml.tensors import Device


@pytest.mark.parametrize("mapped", [True, False])
def test_rates_of_one_shape(monkeypatch: pytest.MonkeyPatch, mapped: bool) -> None:
    monkeypatch.setattr(kernels_ggml, "_SECONDS", 0.05)
    formats = ["fp32", "fp16", "int8-b32", "int4-b32", "q4_k"]
    found = kernels_ggml.measure(formats, (256, 256), 1, mapped=mapped, threads=1)
    assert found.empty_rss_bytes > 10_000_000
    assert list(found.rates) == formats
    packed = Device(1).fastest_memory(NUMBERS["Q4_0"], 256, 256) is not None
    assert found.rates["int4-b32"].overhead == (2.0 if mapped and packed else 1.0)
    assert found.rates["fp32"].overhead == 1.0  # ggml packs no floats
    for rate in found.rates.values():
        assert rate.ns_per_weight > 0
    stored = {"fp32": 4.0, "fp16": 2.0, "int8-b32": 34 / 32, "int4-b32": 18 / 32, "q4_k": 144 / 256}
    for name, rate in found.rates.items():
        assert rate.gb_s == pytest.approx(stored[name] / rate.ns_per_weight)


def test_rows_that_no_block_divides_are_measured_as_they_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_ggml, "_SECONDS", 0.05)
    found = kernels_ggml.measure(["q4_k", "q6_k", "int8-b32"], (64, 96), 1, mapped=True, threads=1)
    assert found.rates["q6_k"].ns_per_weight == found.rates["int8-b32"].ns_per_weight  # llama.cpp's fallback
