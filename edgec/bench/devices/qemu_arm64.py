"""arm64 without an arm64 machine: `qemu-arm64:ROOT`, `qemu-arm64:ROOT,cpu=max`. ROOT: see `_arm64_root`.

The worker that measures elsewhere runs in onnxruntime's aarch64 wheel under qemu's user-mode emulation, on the same
files (nothing is copied but the worker). An emulator's times say nothing about a device, so none is taken. What does
carry over: whether the artifact loads, what it answers (held against this machine's answers to the same input), which
operators the session is made of, and its peak memory, the emulator's own included.

Without ROOT, the environment variable EDGEC_ARM64_ROOT names it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

from edgec.bench.devices import WORKER_FILES
from edgec.bench.devices._agreement import ask, compared
from edgec.bench.devices._arm64_root import CORTEX_A76, CPUS, python_command, python_environment
from edgec.bench.devices._remote import copy_worker
from edgec.bench.devices.local import worker_environment
from edgec.bench.jobs import Job
from edgec.errors import BenchError, EdgecError, UsageError
from edgec.subprocesses import Finished, run

PLUGIN = True
USAGE = "qemu-arm64:ROOT[,cpu=max]"

_ARGUMENT = re.compile(r"(?P<root>.*?)(?:,cpu=(?P<cpu>[^,]*))?", re.DOTALL)
_ROOT_VARIABLE = "EDGEC_ARM64_ROOT"
_SHORT_S = 120.0
_DESCRIBE = "import json, platform; print(json.dumps([platform.machine(), platform.python_version()]))"


def create(argument: str) -> QemuArm64Device:
    """Raises UsageError where no root is named, or an emulated CPU that is not known."""
    match = _ARGUMENT.fullmatch(argument)
    assert match
    cpu = match["cpu"] if match["cpu"] is not None else CORTEX_A76
    if cpu not in CPUS:
        raise UsageError(f"device 'qemu-arm64:{argument}': cpu must be one of {', '.join(CPUS)}, got {cpu!r}")
    root = match["root"] or os.environ.get(_ROOT_VARIABLE, "")
    if not root:
        raise UsageError(
            f"device 'qemu-arm64' needs the folder of an arm64 root: qemu-arm64:FOLDER, or {_ROOT_VARIABLE}; "
            "`python -m runtime_tests.arm64` in a clone of the repository makes one"
        )
    return QemuArm64Device(Path(root).absolute(), cpu)


def needs() -> tuple[str, ...]:
    root = os.environ.get(_ROOT_VARIABLE, "")
    if not root:
        return (
            f"an arm64 root (x86-64 Linux; `python -m runtime_tests.arm64` in a clone makes one), named as "
            f"qemu-arm64:FOLDER or in {_ROOT_VARIABLE}",
        )
    try:
        _require(Path(root))
    except BenchError as error:
        return (str(error),)
    return ()


class QemuArm64Device:
    """Workers are emulated children of this process, one thread each unless the caller says otherwise."""

    timed = False

    def __init__(self, root: Path, cpu: str) -> None:
        self._root, self._cpu = root, cpu
        self.name = f"qemu-arm64 ({cpu})"
        self.notes: tuple[str, ...] = (
            f"emulated arm64 ({cpu}): times are not times, so none is shown; memory includes the emulator's own",
        )
        self._code = ""
        self._remarks: dict[str, tuple[str, ...]] = {}

    def threads(self) -> int:
        return 1

    def describe(self) -> Mapping[str, str]:
        """Raises BenchError where the root does not run."""
        done = run([*self._python(), "-c", _DESCRIBE], timeout_s=_SHORT_S, env=python_environment(self._root))
        if not done.ok:
            raise BenchError(f"{self._root} does not run: {done.reason()}")
        try:
            machine, version = (str(part)[:40] for part in json.loads(done.stdout))
        except (ValueError, TypeError) as error:
            raise BenchError(f"{self._root}: its Python answered {done.stdout[:80]!r}") from error
        return {"processor": f"{self._cpu}, emulated by qemu", "system": f"Linux ({machine})", "python": version}

    def measure(self, job: Job, *, timeout_s: float, on_line: Callable[[bytes], bool]) -> Finished:
        finished = run(
            [*self._python(), "-P", "-m", "edgec.bench.worker"],
            stdin=job.to_json(),
            env=python_environment(self._root, job.threads, self._worker()),
            timeout_s=timeout_s,
            on_line=on_line,
        )
        if finished.ok:
            for remark in self._remarked(job, timeout_s):
                on_line(json.dumps({"event": "remark", "text": remark}).encode())
        return finished

    def _remarked(self, job: Job, timeout_s: float) -> tuple[str, ...]:
        """How this artifact's answers and operators compare with this machine's; found out once."""
        if job.folder not in self._remarks:
            try:
                environment = python_environment(self._root, job.threads, self._worker())
                there = ask(self._python(), environment, job, timeout_s)
                here = ask([sys.executable], worker_environment(job.threads), job, timeout_s)
                self._remarks[job.folder] = compared(here, there, job.task)
            except EdgecError as error:
                self._remarks[job.folder] = (f"answers not compared with this machine's: {error}",)
        return self._remarks[job.folder]

    def _python(self) -> list[str]:
        _require(self._root)
        return python_command(self._root, self._cpu)

    def _worker(self) -> str:
        """A folder with the worker's files, made once and deleted with this object."""
        if not self._code:
            self._code = tempfile.mkdtemp(prefix="edgec-qemu-")
            weakref.finalize(self, shutil.rmtree, self._code, ignore_errors=True)
            copy_worker((*WORKER_FILES, "bench/check.py"), Path(self._code))
        return self._code


def _require(root: Path) -> None:
    """Raises BenchError for what is no arm64 root."""
    if not os.access(root / "emulator", os.X_OK) or not (root / "site").is_dir():
        raise BenchError(
            f"{root} is no arm64 root (expected emulator, sysroot and site in it); `python -m runtime_tests.arm64` in "
            "a clone of the repository makes one"
        )
    python_command(root, CORTEX_A76)
