"""A device at the end of a line: what ssh and adb do alike once they can run a command and copy a folder there.

The far side needs a POSIX shell and a Python 3.11 with numpy and the artifact's runtime. The worker's files and the
artifact go into one new folder, which is deleted afterwards. A worker writes its process id down before it starts, so
that one that was given up on (a time limit, a dropped line, Ctrl-C) is ended there too and does not go on keeping the
device busy; where the device has `timeout`, it ends by itself even when the line never comes back.
"""

from __future__ import annotations

import abc
import atexit
import contextlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from edgec.bench.devices import WORKER_FILES
from edgec.bench.devices._environment import worker_settings
from edgec.bench.devices._remote import FOLDER, assigned, copy_worker, pushable, quoted
from edgec.bench.jobs import Job
from edgec.errors import BenchError, EdgecError
from edgec.subprocesses import Finished, run

SHORT_S = 60.0
COPY_S = 1800.0
ANSWER_BYTES = 1 << 16
_GRACE_S = 15

_START = (
    'printf %s "$$" > "$1" && seconds=$2 && shift 2 && '
    'if command -v timeout > /dev/null; then exec timeout "$seconds" "$@"; else exec "$@"; fi'
)
"""sh -c … sh PIDFILE SECONDS COMMAND…: the number written is the command's own, or that of the `timeout` before it."""

_END = (
    'pid=$(cat "$1") && words=$(tr "\\0" " " < "/proc/$pid/cmdline" 2> /dev/null || ps -p "$pid" -o args=) && '
    'case "$words" in *edgec.bench.worker*) kill "$pid";; esac'
)
"""sh -c … sh PIDFILE: ends what was started, unless the number belongs to another program by now."""

_DESCRIBE = """
import json, os, platform
from edgec.runtime.options import physical_cores
memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
print(json.dumps({
    "cores": physical_cores(),
    "machine": platform.machine(),
    "system": platform.system() + " " + platform.release(),
    "python": platform.python_version(),
    "memory": round(memory, 1),
}))
"""


class LineDevice(abc.ABC):
    """One remote machine; connected when first asked, cleaned up when this process ends."""

    name: str
    notes: tuple[str, ...] = ()
    timed = True

    def __init__(self, temporary: str) -> None:
        """temporary: where folders are made there, an absolute path of plain characters."""
        self._temporary = temporary
        self._folder = ""
        self._pushed: dict[str, str] = {}
        self._told: dict[str, str] = {}
        self._cores = self._copies = 0

    @abc.abstractmethod
    def command(self, command: str) -> list[str]:
        """Arguments that hand one `quoted` command to the shell there."""

    @abc.abstractmethod
    def copying(self, source: Path, target: str) -> list[str]:
        """Arguments that copy the folder `source` (absolute) to the path `target` there, which does not exist yet."""

    @abc.abstractmethod
    def python(self) -> str:
        """The interpreter there."""

    def threads(self) -> int:
        self.describe()
        return self._cores

    def describe(self) -> dict[str, str]:
        """Raises BenchError where the machine cannot be reached or its Python cannot run the worker."""
        if not self._told:
            words = ["env", *assigned({"PYTHONPATH": self._home()}), self.python(), "-P", "-"]
            told = self._answer(words, stdin=_DESCRIBE.encode())
            try:
                found = json.loads(told.splitlines()[-1])
                self._cores = int(found["cores"])
                if not 1 <= self._cores <= 4096:
                    raise ValueError(f"{self._cores} cores")
                self._told = {
                    "processor": str(found["machine"])[:80],
                    "cores": f"{self._cores} physical",
                    "memory": f"{float(found['memory']):.1f} GB",
                    "system": str(found["system"])[:80],
                    "python": str(found["python"])[:20],
                }
            except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
                raise BenchError(f"{self.name}: it answered something else than its description: {error}") from error
        return self._told

    def measure(self, job: Job, *, timeout_s: float, on_line: Callable[[bytes], bool]) -> Finished:
        home, there = self._home(), self._push(Path(job.folder))
        pid_file = f"{home}/worker.pid"
        words = ["sh", "-c", _START, "sh", pid_file, str(int(timeout_s) + _GRACE_S)]
        words += ["env", *assigned(worker_settings(job.threads, home)), self.python(), "-P", "-m", "edgec.bench.worker"]
        ended = False
        try:
            stdin = replace(job, folder=there).to_json()
            finished = run(self._argv(words), stdin=stdin, timeout_s=timeout_s, on_line=on_line)
            ended = finished.ok
        finally:
            if not ended:
                self._end(pid_file)
        return finished

    def _end(self, pid_file: str) -> None:
        """Ends a worker that may still run there; a machine that has gone is left alone."""
        with contextlib.suppress(EdgecError):
            run(self._argv(["sh", "-c", _END, "sh", pid_file]), timeout_s=SHORT_S, max_output_bytes=ANSWER_BYTES)

    def _home(self) -> str:
        """The remote folder with the worker in it, made once."""
        if not self._folder:
            made = self._answer(["mktemp", "-d", f"{self._temporary}/edgec-bench.XXXXXXXX"]).strip()
            if not FOLDER.fullmatch(made) or ".." in made:
                raise BenchError(f"{self.name}: mktemp answered {made[:80]!r}, expected a folder in {self._temporary}")
            self._folder = made
            atexit.register(self.close)
            try:
                with tempfile.TemporaryDirectory(prefix="edgec-line-") as room:
                    self._copy(copy_worker(WORKER_FILES, Path(room)), "edgec")
            except BenchError:
                self.close()  # or the next call would find a folder without a worker
                raise
        return self._folder

    def _push(self, folder: Path) -> str:
        """The artifact's remote copy. Names of ours, so that no name of the user's becomes a remote path."""
        key = str(folder)
        if key not in self._pushed:
            self._home()
            name = f"artifact{self._copies}" + (".gguf" if folder.is_file() else "")
            self._copies += 1  # a copy that failed half-way is never taken up again
            self._copy(pushable(folder), name)
            self._pushed[key] = f"{self._folder}/{name}"
        return self._pushed[key]

    def _copy(self, source: Path, name: str) -> None:
        """source: an absolute path, which no program takes for a host or an option."""
        done = run(self.copying(source, f"{self._folder}/{name}"), timeout_s=COPY_S)
        if not done.ok:
            raise BenchError(f"{self.name}: {source.name} could not be copied there: {done.reason()}")

    def _answer(self, words: Sequence[str], stdin: bytes = b"") -> str:
        done = run(self._argv(words), stdin=stdin, timeout_s=SHORT_S, max_output_bytes=ANSWER_BYTES)
        if not done.ok:
            raise BenchError(f"{self.name}: {words[0]} failed there: {done.reason()}")
        return done.stdout.decode("utf-8", "replace")

    def _argv(self, words: Sequence[str]) -> list[str]:
        return self.command(quoted(words))

    def close(self) -> None:
        """Delete the remote folder, once; what cannot be reached any more is left to the machine's own housekeeping."""
        folder, self._folder = self._folder, ""
        self._pushed.clear()
        atexit.unregister(self.close)
        if folder:
            with contextlib.suppress(EdgecError):
                run(self._argv(["rm", "-rf", "--", folder]), timeout_s=SHORT_S, max_output_bytes=ANSWER_BYTES)
