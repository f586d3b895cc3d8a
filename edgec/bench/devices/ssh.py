"""Another machine through OpenSSH: `ssh:user@host`, `ssh:host:2222`. A Raspberry Pi, a Jetson, a Mac, a server.

It needs Python 3.11 with numpy and the artifact's runtime, and nothing of edgec: the worker's few files and the
artifact are copied into one new folder under /tmp, which is deleted afterwards. OpenSSH's own client is used, so keys,
jump hosts and host checks are what ~/.ssh/config says; it never asks a question (BatchMode). A Python library for SSH
was turned down: it would bring its own idea of keys and known hosts.

Two environment variables: EDGEC_SSH_CONFIG, a file in place of ~/.ssh/config; EDGEC_SSH_PYTHON, the interpreter there
(default python3).
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from edgec.bench.devices import WORKER_FILES
from edgec.bench.devices._remote import FOLDER, assigned, copy_worker, pushable, quoted, worker_settings
from edgec.bench.jobs import Job
from edgec.errors import BenchError, UsageError
from edgec.subprocesses import Finished, run

PLUGIN = True

_TARGET = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})@)?"
    r"(?P<host>[A-Za-z0-9][A-Za-z0-9.-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
_SHORT_S = 60.0
_COPY_S = 1800.0
_ANSWER_BYTES = 1 << 16
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


def create(argument: str) -> SshDevice:
    """Raises UsageError for what is no [user@]host[:port]; nothing is connected yet."""
    match = _TARGET.fullmatch(argument)
    if match is None or not 0 < int(match["port"] or 22) < 1 << 16:
        raise UsageError(f"device 'ssh:{argument}': expected ssh:[user@]host[:port], letters, digits, dots and dashes")
    host = match["host"].strip("[]")
    return SshDevice(f"{match['user']}@{host}" if match["user"] else host, int(match["port"] or 0))


def needs() -> tuple[str, ...]:
    missing = [name for name in ("ssh", "scp") if shutil.which(name) is None]
    return tuple(f"the program {name!r} (OpenSSH's client) is missing" for name in missing)


class SshDevice:
    """One remote machine; connected when first asked, cleaned up when this process ends."""

    notes: tuple[str, ...] = ()
    timed = True

    def __init__(self, target: str, port: int) -> None:
        self._target, self._port = target, port
        self.name = f"ssh:{target}" + (f":{port}" if port else "")
        self._folder = ""
        self._pushed: dict[str, str] = {}
        self._told: dict[str, str] = {}
        self._cores = self._copies = 0

    def threads(self) -> int:
        self.describe()
        return self._cores

    def describe(self) -> dict[str, str]:
        """Raises BenchError where the machine cannot be reached or its Python cannot run the worker."""
        if not self._told:
            words = ["env", *assigned({"PYTHONPATH": self._home()}), _python(), "-P", "-"]
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
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise BenchError(f"{self.name}: it answered something else than its description: {error}") from error
        return self._told

    def measure(self, job: Job, *, timeout_s: float, on_line: Callable[[bytes], bool]) -> Finished:
        home, there = self._home(), self._push(Path(job.folder))
        words = ["env", *assigned(worker_settings(job.threads, home)), _python(), "-P", "-m", "edgec.bench.worker"]
        return run(self._ssh(words), stdin=replace(job, folder=there).to_json(), timeout_s=timeout_s, on_line=on_line)

    def _home(self) -> str:
        """The remote folder with the worker in it, made once."""
        if not self._folder:
            made = self._answer(["mktemp", "-d", "/tmp/edgec-bench.XXXXXXXX"]).strip()  # noqa: S108 - on the device
            if not FOLDER.fullmatch(made) or ".." in made:
                raise BenchError(f"{self.name}: mktemp answered {made[:80]!r}, expected a folder in /tmp")
            self._folder = made
            atexit.register(self.close)
            try:
                with tempfile.TemporaryDirectory(prefix="edgec-ssh-") as room:
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
            name = f"artifact{self._copies}"
            self._copies += 1  # a copy that failed half-way is never taken up again
            self._copy(pushable(folder), name)
            self._pushed[key] = f"{self._folder}/{name}"
        return self._pushed[key]

    def _copy(self, source: Path, name: str) -> None:
        """source: an absolute path, which scp never takes for a host or an option."""
        host, _, tail = self._target.rpartition("@")
        where = f"[{tail}]" if ":" in tail else tail
        target = f"{host}@{where}" if host else where
        port = ["-P", str(self._port)] if self._port else []
        done = run(
            ["scp", "-B", "-q", "-r", *_options(), *port, str(source), f"{target}:{self._folder}/{name}"],
            timeout_s=_COPY_S,
        )
        if not done.ok:
            raise BenchError(f"{self.name}: {source.name} could not be copied there: {done.reason()}")

    def _answer(self, words: Sequence[str], stdin: bytes = b"") -> str:
        done = run(self._ssh(words), stdin=stdin, timeout_s=_SHORT_S, max_output_bytes=_ANSWER_BYTES)
        if not done.ok:
            raise BenchError(f"{self.name}: {words[0]} failed there: {done.reason()}")
        return done.stdout.decode("utf-8", "replace")

    def _ssh(self, words: Sequence[str]) -> list[str]:
        port = ["-p", str(self._port)] if self._port else []
        return ["ssh", "-T", *_options(), *port, "--", self._target, quoted(words)]

    def close(self) -> None:
        """Delete the remote folder, once; what cannot be reached any more is left to the machine's own /tmp."""
        folder, self._folder = self._folder, ""
        self._pushed.clear()
        atexit.unregister(self.close)
        if folder:
            run(self._ssh(["rm", "-rf", "--", folder]), timeout_s=_SHORT_S, max_output_bytes=_ANSWER_BYTES)


def _options() -> list[str]:
    config = os.environ.get("EDGEC_SSH_CONFIG", "")
    chosen = ["-F", str(Path(config).absolute())] if config else []
    return [*chosen, "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15"]


def _python() -> str:
    return os.environ.get("EDGEC_SSH_PYTHON") or "python3"
