"""The `edgec` command in this process (quick) or in its own (signals, limits), and the contract of its failures."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgec.cli import main

TIMEOUT_S = 120


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str


def invoke(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Said:
    """`edgec words...` in this process."""
    capsys.readouterr()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr()
    return Said(int(stop.value.code or 0), said.out, said.err)


def start(*words: str | Path, prepare: Callable[[], None] | None = None, **environment: str) -> subprocess.Popen[str]:
    """`edgec words...` in a process of its own, without a terminal and offline."""

    def begin() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored by whatever a shell runs in the background
        if prepare:
            prepare()

    settings: dict[str, Any] = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "edgec", *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | settings,
        preexec_fn=begin,
    )


def finish(process: subprocess.Popen[str]) -> Said:
    out, err = process.communicate(timeout=TIMEOUT_S)
    return Said(process.returncode, out, err)


def wait_for(process: subprocess.Popen[str], folder: Path, pattern: str) -> None:
    """Until something in `folder` matches; the process must still be running then."""
    limit = time.monotonic() + TIMEOUT_S
    while not any(folder.glob(pattern)):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < limit, f"no {pattern} in {folder}"
        time.sleep(0.01)


def check_failure(said: Said, code: int, message: str) -> None:
    """One line on stderr that says what is wrong, an exit code, and nothing else."""
    lines = said.err.splitlines()
    assert len(lines) == 1, said
    assert re.match(f"edgec: error: .*{message}", lines[0]), lines[0]
    assert said.code == code, said
    assert "Traceback" not in said.out + said.err
    assert not said.out
