"""Where a measurement runs. One file per kind of device, found by file name; this package never imports torch.

A device file sets `PLUGIN = True` and defines

    USAGE: str                          how a person names one, e.g. "ssh:[user@]host[:port]"
    create(argument: str) -> Device     `argument` is what follows the colon of "ssh:user@host"; "" without one
    needs() -> tuple[str, ...]          what is missing here for this kind of device, one line each; () when ready

Every device drives the same worker with the same job; all that differs is how the worker, the artifact and the
answers travel. Names given by people never reach a shell: a device hands argument lists to `edgec.subprocesses`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, cast

from edgec import plugins
from edgec.bench.jobs import Job
from edgec.subprocesses import Finished

WORKER_FILES = (
    "bench/__init__.py",
    "bench/energy.py",
    "bench/jobs.py",
    "bench/roofline.py",
    "bench/worker.py",
    "contraction.py",
    "errors.py",
    "gguf_header.py",
    "limits.py",
    "plugins.py",
    "runtime",
)
"""What a remote device needs of `edgec` beside an empty edgec/__init__.py; a test runs the worker from these alone."""


class Device(Protocol):
    """One place to measure on."""

    name: str
    notes: tuple[str, ...]  # shown in every row, e.g. "emulated: times are not times"
    timed: bool  # False: its times mean nothing, so that no sample is taken and no time is shown

    def threads(self) -> int:
        """Threads used when the caller fixed none: all physical cores."""
        ...

    def describe(self) -> Mapping[str, str]:
        """The machine for the report: processor, cores, memory, system."""
        ...

    def measure(self, job: Job, *, timeout_s: float, on_line: Callable[[bytes], bool]) -> Finished:
        """Runs the worker once in a fresh process. `job.folder` is a folder here; the device takes it where it runs."""
        ...


class DeviceFile(Protocol):
    """What a file in this folder defines at module level."""

    USAGE: str

    def create(self, argument: str) -> Device: ...
    def needs(self) -> tuple[str, ...]: ...


def kinds() -> tuple[str, ...]:
    """Names of all kinds of device, as `open_device` takes them."""
    return tuple(name.replace("_", "-") for name in plugins.names(__name__))


def file(kind: str) -> DeviceFile:
    """The file of one kind. Raises UsageError that lists the known ones."""
    return cast(DeviceFile, plugins.load(__name__, kind.replace("-", "_")))


def open_device(name: str) -> Device:
    """A device by name: "local", or a kind and its argument, "ssh:user@host". Raises UsageError, BenchError."""
    kind, _, argument = name.partition(":")
    return file(kind).create(argument)
