"""This machine, whole and held back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgec.bench.devices import open_device
from edgec.bench.devices._environment import HUGE_PAGES, worker_settings
from edgec.bench.devices._limits import parse_limits, parse_ram_limit
from edgec.bench.devices.local import worker_environment
from edgec.bench.harness import BenchSettings, Contestant, run_bench
from edgec.bench.jobs import Answers, Job
from edgec.errors import BenchError, UsageError
from edgec.runtime.options import one_per_core

QUICK = BenchSettings(rounds=1, samples=1, warmup=0, min_sample_s=0.0, batch=2, threads=1, timeout_s=120)


def test_limits_as_people_type_them() -> None:
    assert parse_limits("") == parse_limits(",")
    found = parse_limits("cores=2,ram=1.5GiB")
    assert (found.cores, found.ram_bytes) == (2, 3 << 29)
    for bad in ("cores=0", "cores=two", "ram=2", "ram=-1GB", "ram=1kB", "cores=1,cores=1", "gpu=1", "cores"):
        with pytest.raises(UsageError):
            parse_limits(bad)
    with pytest.raises(UsageError, match="at least 1 MiB"):
        parse_ram_limit("nanGB")
    with pytest.raises(UsageError, match="cores wanted"):
        open_device("local:cores=9999")


def test_workers_get_huge_pages_and_what_the_user_tunes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert worker_environment(2)["GLIBC_TUNABLES"] == HUGE_PAGES
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=1")
    assert worker_environment(2)["GLIBC_TUNABLES"] == f"{HUGE_PAGES}:glibc.malloc.perturb=1"
    assert worker_settings(2, "code")["GLIBC_TUNABLES"] == HUGE_PAGES, "of another machine, ours says nothing"


def test_one_core_is_one_core(encoder_folder: Path) -> None:
    """The worker holds itself to one logical processor; its own process only."""
    before = os.sched_getaffinity(0)
    device = open_device("local:cores=1")
    assert device.threads() == 1
    answers = Answers()
    job = Job(str(encoder_folder), "encoder", 1, samples=1, warmup=0, min_sample_s=0.0, sentences=("a b",))
    finished = device.measure(job, timeout_s=60, on_line=lambda line: answers.take(line, job))
    assert finished.ok, finished.stderr
    assert answers.done
    assert os.sched_getaffinity(0) == before
    code = (
        "import os, edgec.bench.worker as w; from edgec.bench.jobs import Job; "
        "w._hold_back(Job('x', 'encoder', 1, cores=1)); print(len(os.sched_getaffinity(0)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    assert len(one_per_core(before)) <= len(before)


def test_too_little_memory_fails_the_row_and_says_so(encoder_folder: Path) -> None:
    held = run_bench([Contestant("a", encoder_folder)], QUICK, device=open_device("local:ram=8GB"))
    assert "held to 8000 MB of private memory" in held[0].notes[0]
    with pytest.raises(BenchError, match="nothing could be measured"):
        run_bench([Contestant("a", encoder_folder)], QUICK, device=open_device("local:ram=2MB"))
