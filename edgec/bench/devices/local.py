"""This machine's CPU, whole or held to fewer cores and less memory: `local`, `local:cores=2,ram=2GB`.

The worker limits itself before its runtime starts (`edgec.bench.worker`), so that no helper program is needed and the
limit is part of the job that a reader can repeat.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import edgec
from edgec.bench.devices._environment import worker_settings
from edgec.bench.devices._limits import HostLimits, parse_limits
from edgec.bench.jobs import Job
from edgec.errors import UsageError
from edgec.runtime.options import physical_cores
from edgec.subprocesses import Finished, run

PLUGIN = True
USAGE = "local, local:cores=2,ram=2GB"


def create(argument: str) -> LocalDevice:
    limits = parse_limits(argument)
    if (limits.cores or limits.ram_bytes) and sys.platform != "linux":
        raise UsageError("limits on cores and memory need Linux")
    if limits.cores > physical_cores():
        raise UsageError(f"{limits.cores} cores wanted, this machine gives {physical_cores()}")
    return LocalDevice(limits)


def needs() -> tuple[str, ...]:
    return ()


class LocalDevice:
    """Workers are children of this process, with its interpreter and a fixed environment."""

    timed = True

    def __init__(self, limits: HostLimits) -> None:
        self._limits = limits
        told = []
        if limits.cores:
            told.append(f"held to {limits.cores} physical cores")
        if limits.ram_bytes:
            told.append(
                f"held to {limits.ram_bytes / 1e6:.0f} MB of private memory (RLIMIT_DATA: without mapped model files)"
            )
        self.name = "local"
        self.notes: tuple[str, ...] = tuple(told)

    def threads(self) -> int:
        return self._limits.cores or physical_cores()

    def describe(self) -> dict[str, str]:
        return {
            "processor": _processor(),
            "cores": f"{physical_cores()} physical, {os.cpu_count() or '?'} logical",
            "memory": _memory(),
            "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
            "python": platform.python_version(),
        }

    def measure(self, job: Job, *, timeout_s: float, on_line: Callable[[bytes], bool]) -> Finished:
        held = replace(job, cores=self._limits.cores, ram_limit_bytes=self._limits.ram_bytes)
        return run_worker(held, {}, timeout_s=timeout_s, on_line=on_line)


def run_worker(
    job: Job, settings: Mapping[str, str], *, timeout_s: float, on_line: Callable[[bytes], bool]
) -> Finished:
    """The worker as a child of this process, once. settings: of its environment, beside the usual ones."""
    return run(
        [sys.executable, "-P", "-m", "edgec.bench.worker"],
        stdin=job.to_json(),
        env={**worker_environment(job.threads), **settings},
        timeout_s=timeout_s,
        on_line=on_line,
    )


def worker_environment(threads: int) -> dict[str, str]:
    """Our environment with what every worker gets (`worker_settings`), and the network off; edgec importable."""
    package_root = str(Path(edgec.__file__).resolve().parents[1])
    settings = worker_settings(threads, os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH")))))
    tunables = ":".join(filter(None, (settings["GLIBC_TUNABLES"], os.environ.get("GLIBC_TUNABLES"))))
    return {**os.environ, **settings, "GLIBC_TUNABLES": tunables, "HF_HUB_OFFLINE": "1"}


def _memory() -> str:
    """Physical memory, where the system tells."""
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    except (AttributeError, ValueError, OSError):
        return "unknown"


def _processor() -> str:
    """The processor's marketing name, where the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model") and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"
