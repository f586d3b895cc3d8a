"""The micro-benchmark on real sessions: every format, times that grow with the work, refusals named."""

from __future__ import annotations

import pytest

from edgec.bench import microbench
from edgec.errors import BenchError
from edgec.plan.latency import Sample, fit_costs


def test_it_measures_every_shape_format_and_row_count() -> None:
    told: list[tuple[int, int]] = []
    samples = microbench.measure(
        ((32, 64), (512, 512), (256, 128)), ((2, 64), (4, 32), (32, 0)), (1, 64), seconds=0.2,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert {s[:5] for s in samples} == {
        (n, k, bits, block, rows)
        for n, k in ((32, 64), (512, 512), (256, 128))
        for bits, block in ((2, 64), (4, 32), (32, 0))
        for rows in (1, 64)
    }
    times = {s[:5]: s[5] for s in samples}
    assert all(ms > 0 for ms in times.values())
    for bits, block in ((2, 64), (4, 32), (32, 0)):  # 128 times the work
        assert times[512, 512, bits, block, 64] > 4 * times[32, 64, bits, block, 64]
    assert told[-1] == (100, 100)
    plain: list[Sample] = samples
    assert fit_costs(plain).prices.keys() == {1, 64}


def test_unpacked_products_are_measured_by_the_formats_of_their_files() -> None:
    shapes = ((64, 512), (512, 512), (32, 128))
    samples = microbench.measure(shapes, ((4, 32), (32, 0)), (16,), seconds=0.2, unpacked=True)
    assert [s[2:4] for s in samples] == [(4, 32)] * 3 + [(32, 0)] * 3
    assert all(ms > 0 for *_, ms in samples)


def test_the_default_shapes_tell_all_prices_apart() -> None:
    """As many samples as `fit_costs` wants, without running them."""
    made = [(n, k, b, block, m, 1e-3 + 1e-8 * n * k * m) for n, k in microbench.SHAPES
            for b, block in microbench.FORMATS for m in microbench.ROWS]  # fmt: skip
    assert len(made) == 75
    assert set(fit_costs(made).prices) == set(microbench.ROWS)


def test_what_the_runtime_refuses_is_named() -> None:
    with pytest.raises(BenchError, match="onnxruntime refuses a 64x64 matmul at 4 bits, blocks of 8"):
        microbench.measure(((64, 64),), ((4, 8),), (1,), seconds=0.01)
