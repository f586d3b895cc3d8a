"""Ceilings of a device: measured for real in small, and what becomes of answers that make no sense."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgec.bench import ceilings, roofline
from edgec.bench.harness import BenchSettings, Contestant, run_bench
from edgec.bench.jobs import Job
from edgec.bench.reads import Reads, reads_of
from edgec.errors import BenchError
from edgec.subprocesses import Finished, run

SMALL = 4 * roofline.LEAST_BUFFER_BYTES


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_is_read_by_so_many_threads(threads: int) -> None:
    """Between a hundred megabytes and ten terabytes a second, on whatever machine this is."""
    assert 1e8 < roofline.read_bytes_s(threads, roofline.LEAST_BUFFER_BYTES) < 1e13


def test_every_ceiling_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "_SIDE", 256)
    operations = ceilings.write_products(tmp_path)
    found = roofline.measure(tmp_path, 1, SMALL)
    assert set(found) == {"read_bytes_s_1", *(f"run_s_{name}" for name in operations)}
    assert all(value > 0 for value in found.values())
    assert set(operations.values()) == {2 * roofline.ROWS * 256 * 256}


def test_a_product_that_the_runtime_refuses_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    assert set(roofline.measure(tmp_path, 1, SMALL)) == {"read_bytes_s_1"}


def test_too_little_memory_is_said(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="too few"):
        roofline.measure(tmp_path, 1, SMALL - 4)


class Answering:
    """A local device whose worker says what the test wants."""

    name, notes, timed = "local", (), True

    def __init__(self, *lines: object) -> None:
        self.code = f"for line in {[json.dumps(line) for line in lines]!r}: print(line, flush=True)"
        self.jobs: list[Job] = []

    def threads(self) -> int:
        return 2

    def describe(self) -> dict[str, str]:
        return {}

    def measure(self, job: Job, *, timeout_s: float, on_line: Callable[[bytes], bool]) -> Finished:
        self.jobs.append(job)
        return run([sys.executable, "-S", "-c", self.code], timeout_s=timeout_s, on_line=on_line)


def told(**values: object) -> dict[str, object]:
    return {"event": "ceilings", "values": values}


def test_a_device_is_asked_and_the_best_product_counts() -> None:
    device = Answering(told(read_bytes_s_1=2e9, read_bytes_s_2=3e9, run_s_int8=2.0, run_s_nbits4=1.0))
    found = ceilings.ask(device, 2)
    best = 2.0 * roofline.ROWS * ceilings._SIDE**2
    assert found.values == {"read_bytes_s": 3e9, "read_bytes_s_one_thread": 2e9, "integer_op_s": best}
    assert device.jobs[0].task == roofline.ROOFLINE and device.jobs[0].threads == 2 and not found.problem


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([told(read_bytes_s_2=-1.0)], "which no measurement can be"),
        ([told(**{f"x{i}": 1.0 for i in range(17)})], "a few numbers by name"),
        ([{"event": "ceilings", "values": [1]}], "a few numbers by name"),
        ([{"event": "error", "message": "out of memory"}], "out of memory"),
        ([told(read_bytes_s_4=1e9)], "no roofline"),
    ],
    ids=["negative", "endless", "no object", "error", "other threads"],
)
def test_a_device_that_answers_nonsense_costs_the_roofline_only(lines: list[object], problem: str) -> None:
    found = ceilings.ask(Answering(*lines), 2)
    assert not found.values and problem in found.problem


def test_a_device_with_another_memory_is_not_asked() -> None:
    device = Answering()
    device.name = "cuda:0"
    assert "cuda" in ceilings.ask(device, 2).problem and not device.jobs


def test_what_was_reached_once_can_be_reached() -> None:
    low, high = ceilings.Ceilings({"a": 1.0, "b": 5.0}), ceilings.Ceilings({"a": 2.0, "c": 3.0})
    assert low.or_higher(high).values == {"a": 2.0, "b": 5.0, "c": 3.0}
    lost = ceilings.Ceilings(problem="the line dropped")
    assert low.or_higher(lost) == low and lost.or_higher(lost) == lost


def test_the_limit_is_bandwidth_over_bytes() -> None:
    """1 MB of weights and 1 kB of cache a token, 1000 tokens back, 20 MB/s: ten tokens a second, eight came."""
    found = ceilings.place(Reads(1_000_000, 1000.0), 1000, 20e6, 8.0)
    assert (found.limit_tok_s, found.distance, found.cache_bytes) == (10.0, 1.25, 1_000_000)


def test_a_row_says_how_near_it_came(lm_folder: Path) -> None:
    """The roofline's job goes to the device before and after; the rows hold the higher limit, cache and growth."""
    model = Answering(
        {"event": "ready", "runtime_rss_bytes": 1e6, "versions": {"energy": "this machine does not tell"}},
        {"event": "loaded", "load_s": 0.1, "load_peak_rss_bytes": 2e6},
        {"event": "sample", "metrics": {"decode_tok_s": 50.0}},
        {"event": "context", "short_tokens": 8, "short_rss_bytes": 3e6, "long_tokens": 16, "long_rss_bytes": 4e6},
        {"event": "done", "peak_rss_bytes": 5e6},
    )
    before, after, asked = Answering(told(read_bytes_s_1=5e8)), Answering(told(read_bytes_s_1=1e9)), 0

    def measure(job: Job, *, timeout_s: float, on_line: Callable[[bytes], bool]) -> Finished:
        nonlocal asked
        asked += job.task == roofline.ROOFLINE
        source = model if job.task != roofline.ROOFLINE else before if asked == 1 else after
        return Answering.measure(source, job, timeout_s=timeout_s, on_line=on_line)

    asking = Answering()
    asking.measure = measure  # type: ignore[method-assign]
    settings = BenchSettings(threads=1, rounds=2, samples=1, prompt_tokens=8, new_tokens=4)
    (row,) = run_bench([Contestant("a", lm_folder)], settings, device=asking)
    reads = reads_of(lm_folder)
    assert asked == 2 and row.roofline is not None and row.ceilings["read_bytes_s"] == 1e9
    assert row.roofline.distance == pytest.approx(1e9 / reads.at(10) / 50)
    assert row.kv_cache_bytes == reads.cache_bytes * 12
    assert row.metrics["rss_growth_bytes"].value == pytest.approx(125e6)  # a megabyte over eight tokens
    assert not row.notes and model.jobs[0].long_prompt_tokens == 32
