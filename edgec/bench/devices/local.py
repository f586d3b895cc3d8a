"""This machine's CPU."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import edgec
from edgec.bench.jobs import Job
from edgec.errors import UsageError
from edgec.runtime.options import physical_cores
from edgec.subprocesses import Finished, run

PLUGIN = True


def create(argument: str) -> LocalDevice:
    if argument:
        raise UsageError(f"the device 'local' takes no argument, got {argument!r}")
    return LocalDevice()


def needs() -> tuple[str, ...]:
    return ()


class LocalDevice:
    """Workers are children of this process, with its interpreter and a fixed environment."""

    name = "local"
    notes: tuple[str, ...] = ()

    def threads(self) -> int:
        return physical_cores()

    def describe(self) -> dict[str, str]:
        return {
            "processor": _processor(),
            "cores": f"{physical_cores()} physical, {os.cpu_count() or '?'} logical",
            "memory": _memory(),
            "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
            "python": platform.python_version(),
        }

    def measure(self, job: Job, *, timeout_s: float, on_line: Callable[[bytes], bool]) -> Finished:
        return run(
            [sys.executable, "-P", "-m", "edgec.bench.worker"],
            stdin=job.to_json(),
            env=worker_environment(job.threads),
            timeout_s=timeout_s,
            on_line=on_line,
        )


def worker_environment(threads: int) -> dict[str, str]:
    """Our environment with every thread pool fixed, hashing fixed and the network off; edgec importable."""
    count = str(threads)
    package_root = str(Path(edgec.__file__).resolve().parents[1])
    return {
        **os.environ,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "RAYON_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(p for p in (package_root, os.environ.get("PYTHONPATH", "")) if p),
        "HF_HUB_OFFLINE": "1",
    }


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
