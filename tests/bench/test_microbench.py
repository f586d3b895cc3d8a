"""The micro-benchmarks on real sessions: every format, times that grow with the work, refusals named."""

from __future__ import annotations

import pytest

from edgec.bench import microbench
from edgec.errors import BenchError
from edgec.export.targets import get_target
from edgec.plan.latency import Sample, fit_costs
from edgec.quantize.formats import CoreFormat

SHAPES = ((32, 64), (512, 512), (256, 128))


def test_it_measures_every_shape_format_and_row_count() -> None:
    formats = ("int2-b64", "int4-b32", "fp32")
    told: list[tuple[int, int]] = []
    samples = microbench.measure(
        SHAPES, formats, (1, 64), seconds=0.2, progress=lambda done, total: told.append((done, total))
    )
    times = {s[:4]: s[4] for s in samples}
    assert set(times) == {(n, k, name, rows) for n, k in SHAPES for name in formats for rows in (1, 64)}
    assert all(ms > 0 for ms in times.values())
    for name in formats:  # 128 times the work
        assert times[512, 512, name, 64] > 4 * times[32, 64, name, 64]
    assert told[-1] == (100, 100)
    plain: list[Sample] = samples
    assert fit_costs(plain).prices.keys() == {1, 64}


def test_ggml_s_kernels_are_measured_by_the_types_that_divide_the_rows() -> None:
    pytest.importorskip("llama_cpp")
    from edgec.bench import microbench_ggml

    formats = ("int4-b32", "int8-b32", "q4_k", "q6_k", "iq2_s")
    told: list[tuple[int, int]] = []
    samples = microbench_ggml.measure(
        formats, SHAPES, (1, 64), seconds=0.2, progress=lambda done, total: told.append((done, total))
    )
    times = {s[:4]: s[4] for s in samples}
    whole = {(n, k, name, rows) for n, k in SHAPES for name in formats[:2] for rows in (1, 64)}
    assert set(times) == whole | {(512, 512, name, rows) for name in formats[2:] for rows in (1, 64)}
    assert all(ms > 0 for ms in times.values())
    for name in formats[:2]:
        assert times[512, 512, name, 64] > 4 * times[32, 64, name, 64]
    assert told[-1] == (100, 100)


def test_unpacked_products_are_measured_by_the_formats_of_their_files() -> None:
    shapes = ((64, 512), (512, 512), (32, 128))
    samples = microbench.measure(shapes, ("int4-b32", "fp32"), (16,), seconds=0.2, unpacked=True)
    assert [s[2] for s in samples] == ["int4-b32"] * 3 + ["fp32"] * 3
    assert all(s[4] > 0 for s in samples)


@pytest.mark.parametrize(("target", "count"), [("onnx-x64", 75), ("gguf", 102), ("gguf-factored", 30)])
def test_the_default_shapes_tell_all_prices_apart(target: str, count: int) -> None:
    """As many samples as `fit_costs` wants, without running them."""
    found = get_target(target)
    ours = dict.fromkeys((*found.dense_formats, *found.factored_formats))
    formats = microbench.FORMATS if target == "onnx-x64" else tuple(ours)
    made = [
        (n, k, name, m, 1e-3 + 1e-8 * n * k * m)
        for n, k in microbench.SHAPES
        for name in formats
        if CoreFormat.parse(name).block == 0 or k % CoreFormat.parse(name).block == 0
        for m in microbench.ROWS
    ]
    assert len(made) == count
    assert set(fit_costs(made).prices) == set(microbench.ROWS)


def test_what_the_runtime_refuses_is_named() -> None:
    with pytest.raises(BenchError, match="onnxruntime refuses a 64x64 matmul in int3-b32"):
        microbench.measure(((64, 64),), ("int3-b32",), (1,), seconds=0.01)
