"""The only module that starts other processes.

Everything that edgec runs beside itself (measurement workers, other people's exporters, device tools) goes
through `run`: an argument list and never a shell, output that is capped while it arrives, a time limit, and
a process group that is killed whole. The linter refuses `subprocess` anywhere else, so that none of these
properties can be forgotten at a call site. `asyncio` was turned down: two reader threads do the same job
without making every caller asynchronous.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgec import limits
from edgec.errors import EdgecError, RuntimeUnavailableError

_CHUNK = 1 << 16
_TAIL_BYTES = 1 << 16
_END = b""


@dataclass(frozen=True)
class Finished:
    """How a process ended. `stdout` is whole up to the cap; `stderr` is its last 64 KiB.

    returncode: the exit status; negative for a signal. stopped: "" when the process ended by itself, else
    "timeout", "output" (it wrote more than the cap), "consumer" (`on_line` returned False) or "asked" (`stop` was set).
    seconds: wall time.
    """

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes
    seconds: float
    stopped: str = ""

    @property
    def ok(self) -> bool:
        return self.returncode == 0 and not self.stopped

    def reason(self) -> str:
        """Why it failed, in one line: what stopped it or its status, and the last line it wrote to stderr."""
        if self.stopped == "timeout":
            cause = f"stopped after {self.seconds:.0f} s without finishing"
        elif self.stopped == "output":
            cause = "stopped because it wrote more than it may"
        elif self.stopped == "asked":
            cause = "stopped when it was no longer needed"
        elif self.stopped:
            cause = "stopped because its output made no sense"
        elif self.returncode < 0:
            cause = f"killed by {_signal_name(-self.returncode)}"
        else:
            cause = f"exit status {self.returncode}"
        lines = self.stderr.decode("utf-8", "replace").strip().splitlines()
        return f"{cause}: {lines[-1].strip()[:300]}" if lines else cause


def run(
    argv: Sequence[str | Path],
    *,
    timeout_s: float,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    max_output_bytes: int = limits.MAX_WORKER_OUTPUT_BYTES,
    on_line: Callable[[bytes], bool] | None = None,
    stop: threading.Event | None = None,
) -> Finished:
    """Runs `argv` to its end and returns how it ended; never raises for a failing process.

    env: the complete environment (None: ours). on_line: called with every complete stdout line, without its
    newline, as it arrives; returning False stops the process. stop: ends the process, within a second of being set (for
    programs that do not end by themselves; `stopped` is then "asked"). stderr beyond its tail is dropped, but counts
    towards the cap, so that a process that floods it is stopped too.
    Raises RuntimeUnavailableError when the program does not exist, EdgecError when it cannot be started.
    """
    command = tuple(str(a) for a in argv)
    if any("\0" in a for a in command):
        raise EdgecError(f"a command's argument holds a NUL character: {command!r}")
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise RuntimeUnavailableError(f"the program {command[0]!r} was not found; install it first") from error
    except OSError as error:
        raise EdgecError(f"the program {command[0]!r} could not be started: {error.strerror}") from error
    with _killed_at_exit(process):
        return _collect(process, command, started, timeout_s, stdin, max_output_bytes, on_line, stop)


def _collect(
    process: subprocess.Popen[bytes],
    command: tuple[str, ...],
    started: float,
    timeout_s: float,
    stdin: bytes,
    cap: int,
    on_line: Callable[[bytes], bool] | None,
    stop: threading.Event | None,
) -> Finished:
    assert process.stdin and process.stdout and process.stderr
    chunks: queue.Queue[tuple[str, bytes]] = queue.Queue(maxsize=64)
    threads = [
        threading.Thread(target=_feed, args=(process.stdin, stdin), daemon=True),
        threading.Thread(target=_drain, args=("out", process.stdout, chunks), daemon=True),
        threading.Thread(target=_drain, args=("err", process.stderr, chunks), daemon=True),
    ]
    for thread in threads:
        thread.start()
    out, err, pending = bytearray(), bytearray(), bytearray()
    seen, open_streams, stopped = 0, 2, ""
    while open_streams and not stopped:
        left = started + timeout_s - time.monotonic()
        if left <= 0:
            stopped = "timeout"
            break
        if stop is not None and stop.is_set():
            stopped = "asked"
            break
        try:
            stream, data = chunks.get(timeout=min(left, 0.2 if stop else 1.0))
        except queue.Empty:
            continue
        if data == _END:
            open_streams -= 1
            continue
        seen += len(data)
        if stream == "err":
            err += data
            del err[:-_TAIL_BYTES]
        else:
            out += data[: max(0, cap - len(out))]
            if on_line is not None:
                pending += data
                stopped = "" if _hand_lines(pending, on_line) else "consumer"
        if seen > cap and not stopped:
            stopped = "output"
    if not stopped:
        try:
            process.wait(max(0.1, started + timeout_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            stopped = "timeout"
    if stopped:
        _kill_group(process)
        # Readers may be blocked on a full queue; emptying it lets them see the closed pipe and end. What the process
        # had written to stdout before it was stopped still counts: samples that were measured are kept.
        with contextlib.suppress(queue.Empty):
            while True:
                stream, data = chunks.get(timeout=0.05)
                if stream == "out" and data != _END and len(out) < cap and stopped != "consumer":
                    out += data[: cap - len(out)]
                    if on_line is not None:
                        pending += data
                        if not _hand_lines(pending, on_line):
                            stopped = "consumer"
    process.wait()
    for thread in threads:
        thread.join(timeout=1.0)
    return Finished(command, process.returncode, bytes(out), bytes(err), time.monotonic() - started, stopped)


def _hand_lines(pending: bytearray, on_line: Callable[[bytes], bool]) -> bool:
    """Hands every complete line of `pending` on and removes it; False when the consumer wants no more."""
    while (end := pending.find(b"\n")) >= 0:
        line = bytes(pending[:end])
        del pending[: end + 1]
        if not on_line(line):
            return False
    return True


def _feed(stream: IO[bytes], data: bytes) -> None:
    """Writes stdin; a process that ends without reading all of it is no error here."""
    with contextlib.suppress(OSError, ValueError):
        stream.write(data)
    with contextlib.suppress(OSError, ValueError):
        stream.close()


def _drain(name: str, stream: IO[bytes], chunks: queue.Queue[tuple[str, bytes]]) -> None:
    with contextlib.suppress(OSError, ValueError):
        while data := os.read(stream.fileno(), _CHUNK):
            chunks.put((name, data))
    chunks.put((name, _END))


@contextlib.contextmanager
def _killed_at_exit(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever happens (Ctrl-C included), nothing that we started outlives this call."""
    try:
        yield
    finally:
        if process.poll() is None:
            _kill_group(process)
            process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.close()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and its children; the group is its own because it was started in a new session."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
