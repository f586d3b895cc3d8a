"""onnxruntime-web (WebAssembly) in headless Chromium: `browser:FOLDER`, FOLDER an installed onnxruntime-web.

A command of edgec uses no network, so the runtime is taken from where npm put it (`npm install onnxruntime-web`), or
from the folder that EDGEC_ORT_WEB names. EDGEC_BROWSER names another Chromium. The page, the runtime and the model
come from a server on the loopback interface, below a random path; the page answers by posting the worker's JSON lines
back, which needs neither a driver nor a debugging port. The profile is a temporary folder, the user's own is never
opened, and no other host resolves.

Memory is that of the page's process (Linux: resident set and its peak, from /proc): the browser's other processes are
left out, since an application is one page among others.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import psutil

from edgec.bench.browser_job import PageJob, page_job
from edgec.bench.devices._agreement import ask, compared, read_answer
from edgec.bench.devices._browser_server import PageServer, Route
from edgec.bench.devices.local import create as local
from edgec.bench.devices.local import worker_environment
from edgec.bench.jobs import Job
from edgec.errors import BenchError, EdgecError, UsageError
from edgec.runtime.options import physical_cores
from edgec.subprocesses import Finished, run

PLUGIN = True
USAGE = "browser:FOLDER of onnxruntime-web"

_FOLDER_VARIABLE, _BROWSER_VARIABLE = "EDGEC_ORT_WEB", "EDGEC_BROWSER"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_MODULE = "ort.wasm.min.mjs"
_DIST_FILE = re.compile(r"ort[A-Za-z0-9._-]{1,80}\.(mjs|wasm)")
_MAX_PACKAGE_BYTES = 1 << 20
_PAGE = Path(__file__).parent / "_browser"
_FLAGS = (
    "--headless=new",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-background-timer-throttling",
    "--disable-breakpad",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-gpu",
    "--disable-renderer-backgrounding",
    "--disable-sync",
    "--metrics-recording-only",
    "--mute-audio",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


def create(argument: str) -> BrowserDevice:
    """Raises UsageError where no folder of onnxruntime-web is named or it is none, or no browser is found."""
    if sys.platform != "linux":
        raise UsageError("the device 'browser' needs Linux: the memory of the page's process is read from /proc")
    folder = argument or os.environ.get(_FOLDER_VARIABLE, "")
    if not folder:
        raise UsageError(f"device 'browser' needs {_wanted()}")
    try:
        return BrowserDevice(Path(folder).absolute(), _browser())
    except BenchError as error:
        raise UsageError(f"device 'browser:{folder}': {error}") from error


def needs() -> tuple[str, ...]:
    missing = [] if sys.platform == "linux" else ["Linux"]
    try:
        _browser()
    except BenchError as error:
        missing.append(str(error))
    folder = os.environ.get(_FOLDER_VARIABLE, "")
    if not folder:
        missing.append(_wanted())
    else:
        try:
            _version(Path(folder))
        except BenchError as error:
            missing.append(str(error))
    return tuple(missing)


class BrowserDevice:
    """A fresh browser with an empty profile for every measurement."""

    name = "browser"
    timed = True

    def __init__(self, package: Path, program: str) -> None:
        """Raises BenchError where `package` is no installed onnxruntime-web."""
        self._package, self._program = package, program
        self._version = _version(package)
        self._remarks: dict[str, tuple[str, ...]] = {}
        told = [
            f"onnxruntime-web {self._version} (WASM): loading includes the runtime's own start, and fetching the files "
            "from this machine",
            "memory is the page's process alone; texts were tokenized beforehand, outside the times",
        ]
        if _unconfined():
            told.append("Chromium ran without its sandbox, because it ran as root")
        self.notes: tuple[str, ...] = tuple(told)

    def threads(self) -> int:
        return physical_cores()

    def describe(self) -> Mapping[str, str]:
        done = run([self._program, "--version"], timeout_s=60)
        version = done.stdout.decode("utf-8", "replace").strip()[:120]
        if not done.ok or not version:
            raise BenchError(f"{self._program} does not say its version: {done.reason()}")
        return {**local("").describe(), "browser": version, "onnxruntime-web": self._version}

    def measure(self, job: Job, *, timeout_s: float, on_line: Callable[[bytes], bool]) -> Finished:
        page = page_job(job)
        if job.folder in self._remarks:
            page.record["check"] = None  # compared in an earlier round
        with tempfile.TemporaryDirectory(prefix="edgec-browser-", ignore_cleanup_errors=True) as profile:
            session = _Session(profile, on_line)
            with PageServer(self._routes(page), session.take) as server:
                finished = run(
                    [self._program, *_flags(profile), server.url],
                    env={**os.environ, "HOME": profile, "XDG_CONFIG_HOME": profile, "XDG_CACHE_HOME": profile},
                    timeout_s=timeout_s,
                    stop=session.ended,
                )
        if session.refused:
            return replace(finished, stopped="consumer")
        if not session.done:
            return finished
        self._remark(job, session.answer, timeout_s, on_line)
        return replace(finished, returncode=0, stopped="")

    def _routes(self, page: PageJob) -> dict[str, Route]:
        runtime = {f"ort/{p.name}": p for p in (self._package / "dist").iterdir() if _DIST_FILE.fullmatch(p.name)}
        own = {name: _PAGE / name for name in ("page.html", "worker.mjs")}
        return {**own, **runtime, **page.files, "job.json": json.dumps(page.record).encode()}

    def _remark(self, job: Job, answer: bytes, timeout_s: float, on_line: Callable[[bytes], bool]) -> None:
        """How the page's answers compare with those of this machine's own onnxruntime; found out once."""
        if job.folder not in self._remarks:
            try:
                here = ask([sys.executable], worker_environment(job.threads), job, timeout_s)
                told = compared(here, read_answer(answer), job.task)[:1]
            except EdgecError as error:
                told = (f"answers not compared with this machine's own runtime: {error}",)
            self._remarks[job.folder] = told
        for remark in self._remarks[job.folder]:
            on_line(json.dumps({"event": "remark", "text": remark}).encode())


class _Session:
    """Reads what the page posts, adds what only the system knows (memory), and hands it on."""

    def __init__(self, profile: str, on_line: Callable[[bytes], bool]) -> None:
        self._profile, self._on_line = profile, on_line
        self.ended = threading.Event()
        self.done = self.refused = False
        self.answer = b""
        self._peak = 0

    def take(self, body: bytes) -> bool:
        """One posted event; False ends the page."""
        try:
            event = json.loads(body)
            kind = event.get("event")
        except (ValueError, AttributeError, RecursionError):
            return self._hand_on(body[:200].replace(b"\n", b" "))  # refused there, in the harness's own words
        if kind == "answer":
            self.answer = json.dumps({**event, "machine": "WebAssembly", "operators": {}}).encode()
            return True
        now, peak = page_memory(self._profile)
        if kind == "measured":  # before the comparison, which is no part of the measurement
            self._peak = peak
            return True
        added = {
            "ready": {"runtime_rss_bytes": now},
            "loaded": {"load_peak_rss_bytes": peak},
            "done": {"peak_rss_bytes": self._peak or peak},
        }
        good = self._hand_on(json.dumps({**event, **added.get(str(kind), {})}).encode())
        self.done = good and kind == "done"
        if kind in ("done", "error"):
            self.ended.set()
        return good

    def _hand_on(self, line: bytes) -> bool:
        if not self._on_line(line):
            self.refused = True
            self.ended.set()
        return not self.refused


def page_memory(profile: str) -> tuple[int, int]:
    """Resident set now and at its peak [bytes] of the largest page of the browser with this profile; (0, 0): none."""
    found = [(0, 0)]
    for process in psutil.Process().children(recursive=True):
        try:
            words = process.cmdline()
            if any(profile in word for word in words) and not any(word.startswith("--type=") for word in words):
                found += [_memory(page.pid) for page in process.children(recursive=True)]
        except psutil.Error:
            continue  # it ended meanwhile
    return max(found, key=lambda pair: pair[1])


def _memory(pid: int) -> tuple[int, int]:
    """(VmRSS, VmHWM) of a renderer, (0, 0) for any other process and for one that has gone."""
    try:
        if b"--type=renderer" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return 0, 0
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0, 0
    sizes = {k: v for k, _, v in (line.partition(":") for line in lines) if k in ("VmRSS", "VmHWM")}
    return tuple(int(sizes[k].split()[0]) * 1024 for k in ("VmRSS", "VmHWM")) if len(sizes) == 2 else (0, 0)  # type: ignore[return-value]


def _flags(profile: str) -> list[str]:
    return [*_FLAGS, f"--user-data-dir={profile}", *(["--no-sandbox"] if _unconfined() else [])]


def _unconfined() -> bool:
    """Chromium refuses to start its sandbox for root."""
    return os.geteuid() == 0


def _browser() -> str:
    """Raises BenchError."""
    chosen = os.environ.get(_BROWSER_VARIABLE, "")
    for name in (chosen,) if chosen else _BROWSERS:
        if found := shutil.which(name):
            return found
    raise BenchError(
        f"the browser {chosen!r} was not found"
        if chosen
        else f"no Chromium (looked for {', '.join(_BROWSERS)}; {_BROWSER_VARIABLE} names another)"
    )


def _version(package: Path) -> str:
    """The version of an installed onnxruntime-web. Raises BenchError for any other folder."""
    path = package / "package.json"
    try:
        if path.stat().st_size > _MAX_PACKAGE_BYTES:
            raise ValueError("too large")
        record = json.loads(path.read_bytes())
        name, version = record["name"], str(record["version"])[:40]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BenchError(f"{package} is no installed onnxruntime-web ({error}); it needs {_wanted()}") from error
    if name != "onnxruntime-web" or not (package / "dist" / _MODULE).is_file():
        raise BenchError(f"{package} holds {str(name)[:60]!r} without dist/{_MODULE}; it needs {_wanted()}")
    return version


def _wanted() -> str:
    return (
        "an installed onnxruntime-web: `npm install onnxruntime-web`, then browser:node_modules/onnxruntime-web, "
        f"or the folder in {_FOLDER_VARIABLE}"
    )
