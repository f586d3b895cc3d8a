"""The harness: rotation, medians and their intervals, and every way in which a worker can fail."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import artifacts_for_tests as artifacts
import numpy as np
import pytest

from edgec.bench.devices import file, kinds, open_device
from edgec.bench.harness import BenchSettings, Contestant, run_bench, spread
from edgec.bench.jobs import Job
from edgec.errors import BenchError, RuntimeUnavailableError, UsageError
from edgec.records import as_dict
from edgec.subprocesses import Finished, run

QUICK = BenchSettings(rounds=3, samples=1, warmup=0, min_sample_s=0.0, batch=2, threads=1, timeout_s=20)


def script(rate: float, *, rss: int = 20_000_000, tail: str = "") -> str:
    """A worker in one line of Python that answers `rate` sentences/s, then runs `tail`."""
    events = [
        {"event": "ready", "runtime_rss_bytes": 1_000_000, "versions": {}},
        {"event": "loaded", "load_s": 0.1, "load_peak_rss_bytes": 2_000_000},
        {"event": "sample", "metrics": {"items_s": rate, "item_ms": 1.0}},
    ]
    lines = [json.dumps(e) for e in events] + (
        [json.dumps({"event": "done", "peak_rss_bytes": rss})] if not tail else []
    )
    return f"import os, sys, time\nfor line in {lines!r}: print(line, flush=True)\n{tail}"


class ScriptedDevice:
    """Runs a given script per contestant folder name instead of the worker."""

    name = "scripted"
    notes: tuple[str, ...] = ("a note of the device",)
    timed: bool = True

    def __init__(self, scripts: dict[str, Callable[[int], str]]) -> None:
        self.scripts, self.order, self.runs = scripts, list[str](), dict[str, int]()

    def threads(self) -> int:
        return 1

    def describe(self) -> dict[str, str]:
        return {}

    def measure(self, job: Job, *, timeout_s: float, on_line: Callable[[bytes], bool]) -> Finished:
        name = Path(job.folder).name
        self.order.append(name)
        self.runs[name] = self.runs.get(name, -1) + 1
        code = self.scripts[name](self.runs[name])
        return run([sys.executable, "-S", "-c", code], timeout_s=timeout_s, on_line=on_line, max_output_bytes=1 << 20)


@pytest.fixture
def contestants(tmp_path: Path) -> list[Contestant]:
    return [Contestant(n, artifacts.encoder(tmp_path / n, pooled=True)) for n in "abc"]


def constant(code: str) -> Callable[[int], str]:
    return lambda run: code


def test_order_rotates_and_every_round_has_every_contestant(contestants: list[Contestant]) -> None:
    device = ScriptedDevice({n: constant(script(10.0)) for n in "abc"})
    seen: list[tuple[int, int]] = []
    run_bench(contestants, QUICK, lambda done, total, text: seen.append((done, total)), device)
    assert "".join(device.order) == "abcbcacab"
    assert seen[0] == (0, 9) and seen[-1] == (9, 9)


def test_a_row_holds_the_median_over_processes_and_its_interval(contestants: list[Contestant]) -> None:
    device = ScriptedDevice({"a": lambda run: script([10.0, 30.0, 20.0][run], rss=20_000_000 + run)})
    (row,) = run_bench(contestants[:1], QUICK, device=device)
    found = row.metrics["items_s"]
    assert (found.value, found.low, found.high, found.n) == (20.0, 10.0, 30.0, 3)
    assert row.metrics["peak_rss_bytes"].value == 20_000_001 and row.metrics["runtime_rss_bytes"].value == 1_000_000
    assert row.artifact_bytes == (contestants[0].folder / "model.onnx").stat().st_size
    assert row.settings["batch"] == 2 and row.threads == 1 and "a note of the device" in row.notes
    assert any(n.startswith("unsettled: items_s spreads over 100 %") for n in row.notes)
    assert json.loads(json.dumps(as_dict(row)))["contestant"] == "a"


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        ("os.abort()", "SIGABRT"),
        ("os.kill(os.getpid(), 9)", "SIGKILL"),
        ("time.sleep(60)", "without finishing"),
        ("while True: print('{}')", "unknown event"),
        ("while True: sys.stderr.write('x' * 9999)", "wrote more than"),
        ("print('not json')", "not JSON"),
        ('print(\'{"event": "done", "peak_rss_bytes": NaN}\')', "is nan"),
        ('print(\'{"event": "error", "message": "out of luck"}\')', "out of luck"),
        ("sys.exit(0)", "before it had answered everything"),
    ],
)
def test_a_worker_that_dies_after_its_samples_leaves_an_incomplete_row(
    contestants: list[Contestant], tail: str, said: str
) -> None:
    device = ScriptedDevice({"a": constant(script(10.0, tail=tail)), "b": constant(script(10.0))})
    settings = BenchSettings(rounds=3, samples=1, warmup=0, batch=2, timeout_s=2)
    a, b = run_bench(contestants[:2], settings, device=device)
    assert a.metrics["items_s"].n == 2 and "peak_rss_bytes" not in a.metrics
    assert any(n.startswith("incomplete: round 1: ") and said in n for n in a.notes), a.notes
    assert device.order.count("a") == 2, "given up after two failures in a row"
    assert b.metrics["items_s"].n == 3 and b.metrics["peak_rss_bytes"].n == 3


def test_what_has_no_spread_says_so(contestants: list[Contestant]) -> None:
    """Of one round as a whole, and of a figure that only one of several processes gave."""
    device = ScriptedDevice({"a": constant(script(10.0))})
    (row,) = run_bench(contestants[:1], replace(QUICK, rounds=1), device=device)
    assert "one measurement: no spread is known" in row.notes
    device = ScriptedDevice({"a": lambda run: script(10.0) if run == 0 else "import sys; sys.exit('gone')"})
    (row,) = run_bench(contestants[:1], QUICK, device=device)
    assert row.metrics["items_s"].n == 1 and "one measurement: no spread is known" in row.notes


def test_one_failed_round_does_not_end_a_contestant(contestants: list[Contestant]) -> None:
    device = ScriptedDevice({"a": lambda run: "import sys; sys.exit('bad luck')" if run == 1 else script(10.0)})
    (row,) = run_bench(contestants[:1], QUICK, device=device)
    assert row.metrics["items_s"].n == 2
    assert [n for n in row.notes if n.startswith("incomplete")] == ["incomplete: round 2: exit status 1: bad luck"]


def test_a_contestant_without_any_sample_gets_a_failed_row(contestants: list[Contestant]) -> None:
    device = ScriptedDevice({"a": constant("import sys; sys.exit('no')"), "b": constant(script(10.0))})
    a, b = run_bench(contestants[:2], QUICK, device=device)
    assert not a.metrics and any(n.startswith("failed: round 1: exit status 1: no") for n in a.notes) and b.metrics


def test_nothing_measured_at_all_is_an_error(contestants: list[Contestant]) -> None:
    device = ScriptedDevice({"a": constant("import sys; sys.exit('no')")})
    with pytest.raises(BenchError, match="nothing could be measured; a: round 1: exit status 1: no"):
        run_bench(contestants[:1], QUICK, device=device)


def test_a_device_that_goes_away_is_a_failure_of_the_round(contestants: list[Contestant]) -> None:
    class Unplugged(ScriptedDevice):
        def measure(self, job: Job, *, timeout_s: float, on_line: Callable[[bytes], bool]) -> Finished:
            if len(self.order) >= 1:
                raise RuntimeUnavailableError("the cable is out")
            return super().measure(job, timeout_s=timeout_s, on_line=on_line)

    (row,) = run_bench(contestants[:1], QUICK, device=Unplugged({"a": constant(script(10.0))}))
    assert row.metrics["items_s"].n == 1 and any("the cable is out" in n for n in row.notes)


def test_the_local_device_measures_for_real(contestants: list[Contestant]) -> None:
    settings = BenchSettings(rounds=2, samples=1, warmup=1, min_sample_s=0.0, batch=2, sentence_words=4, threads=1)
    rows = run_bench(contestants[:2], settings)
    assert [r.contestant for r in rows] == ["a", "b"]
    for row in rows:
        assert row.device == "local" and not [n for n in row.notes if n.startswith(("failed", "incomplete"))]
        assert all(math.isfinite(s.value) and s.low <= s.value <= s.high and s.n == 2 for s in row.metrics.values())
        assert {"items_s", "item_ms", "load_s", "peak_rss_bytes", "runtime_rss_bytes"} <= set(row.metrics)


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_contestants_need_different_names(names: Sequence[str], encoder_folder: Path) -> None:
    with pytest.raises(UsageError, match="different names"):
        run_bench([Contestant(n, encoder_folder) for n in names], QUICK)


@pytest.mark.parametrize(
    "bad", [{"rounds": 0}, {"threads": -1}, {"timeout_s": 1e9}, {"spread_bound": math.nan}, {"new_tokens": 0}]
)
def test_settings_that_make_no_sense_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        BenchSettings(**bad)  # type: ignore[arg-type]


def test_a_missing_folder_or_an_unknown_task_is_refused_before_any_run(tmp_path: Path, encoder_folder: Path) -> None:
    with pytest.raises(BenchError, match="neither a folder nor a .gguf file"):
        run_bench([Contestant("x", tmp_path / "gone")], QUICK)
    with pytest.raises(UsageError, match="cannot be measured"):
        run_bench([Contestant("x", encoder_folder, task="vision")], QUICK)


def test_devices_are_found_by_file_name() -> None:
    assert "local" in kinds()
    for kind in kinds():
        assert isinstance(file(kind).needs(), tuple)
    assert open_device("local").describe()["processor"]
    for bad in ("local:argument", "toaster", "../local", "local; rm -rf /"):
        with pytest.raises(UsageError):
            open_device(bad)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9, 25])
def test_the_interval_has_the_median_of_all_processes_in_it_as_often_as_it_says(count: int) -> None:
    """Of a skewed distribution, whose median is known; fewer than five values cannot promise 90 %."""
    cut = {2: 0, 3: 0, 4: 0, 5: 0, 8: 1, 9: 1, 25: 7}[count]  # tables of the sign test
    draws = np.random.default_rng(0).exponential(size=(4000, count))
    found = [spread(list(row)) for row in draws]
    ordered = np.sort(draws, axis=1)
    assert [(one.low, one.high) for one in found] == [(row[cut], row[-1 - cut]) for row in ordered]
    share = np.mean([one.low <= math.log(2) <= one.high for one in found])
    assert share == pytest.approx(1 - 2 * sum(math.comb(count, k) for k in range(cut + 1)) / 2**count, abs=0.02)
    assert count < 5 or share > 0.9


def test_spread_refuses_what_is_no_number() -> None:
    assert spread([4.0]).low == spread([4.0]).high == 4.0
    with pytest.raises(BenchError):
        spread([1.0, math.nan])


def test_a_device_whose_times_mean_nothing_gives_memory_and_remarks(contestants: list[Contestant]) -> None:
    """Nothing timed is shown; the row is no failure; a remark that every round repeats is shown once."""
    lines = [
        {"event": "ready", "runtime_rss_bytes": 1_000_000, "versions": {}},
        {"event": "loaded", "load_s": 0.1, "load_peak_rss_bytes": 2_000_000},
        {"event": "remark", "text": "agrees"},
        {"event": "done", "peak_rss_bytes": 3_000_000},
    ]
    code = f"for line in {[json.dumps(e) for e in lines]!r}: print(line, flush=True)"
    device = ScriptedDevice({"a": constant(code)})
    device.timed = False
    (row,) = run_bench(contestants[:1], QUICK, device=device)
    assert sorted(row.metrics) == ["load_peak_rss_bytes", "peak_rss_bytes", "runtime_rss_bytes"]
    assert row.notes == ("a note of the device", "agrees")


def test_endless_remarks_end_the_worker(contestants: list[Contestant]) -> None:
    device = ScriptedDevice({"a": constant(script(10.0, tail='while True: print(\'{"event": "remark"}\')'))})
    (row,) = run_bench(contestants[:1], QUICK, device=device)
    assert any("more than 16 remarks" in note for note in row.notes)
