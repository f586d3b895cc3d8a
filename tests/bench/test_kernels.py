"""The runtime's own cost per weight, measured for real on a few weights: finite, positive, and more bits more bytes."""

from __future__ import annotations

from functools import partial

import pytest

from edgec.bench import kernels
from edgec.errors import BenchError
from edgec.export.onnx.stack import write_stack
from edgec.subprocesses import Finished

PACKED, INT8 = (partial(write_stack, accuracy_level=4, int8=int8) for int8 in (False, True))


@pytest.mark.parametrize("write", [PACKED, INT8])
def test_rates_of_a_few_weights(monkeypatch: pytest.MonkeyPatch, write: kernels.Write) -> None:
    monkeypatch.setattr(kernels, "MIN_WEIGHTS", 1 << 20)
    monkeypatch.setattr(kernels, "_SECONDS", 0.05)
    found = kernels.measure("encoder", ["fp32", "int4-b32"], (256, 256), 1 << 18, rows=2, write=write, threads=1)
    assert found.empty_rss_bytes > 10_000_000
    assert set(found.rates) == {"fp32", "int4-b32"}
    for rate in found.rates.values():
        assert rate.ns_per_weight > 0
        assert 0 <= rate.overhead < 20
        seconds = rate.ns_per_weight * 1e-9 * (1 << 20)
        stored = {"fp32": 4, "int4-b32": 18 / 32}[rate.format] * (1 << 20)
        assert rate.gb_s == pytest.approx(stored / seconds / 1e9)


@pytest.mark.parametrize(
    ("code", "out"), [(1, b""), (0, b'{"runtime_rss_bytes": NaN}'), (0, b'{"runtime_rss_bytes": 0}')]
)
def test_a_probe_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, code: int, out: bytes) -> None:
    monkeypatch.setattr(kernels, "run", lambda argv, **_: Finished(tuple(argv), code, out, b"no runtime", 0.1))
    with pytest.raises(BenchError, match="the runtime could not be measured: "):
        kernels.measure("encoder", ["fp32"], (32, 32), 1, rows=1, write=PACKED, threads=1)
