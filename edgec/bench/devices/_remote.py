"""What devices at the end of a line share: the worker's files, safe names, the one quoting function.

A remote shell always parses what ssh and adb hand it, whatever argument list is given here. So remote commands are
composed in one way only: fixed words of ours, and everything else through `quoted`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import edgec
from edgec.errors import BenchError

FOLDER = re.compile(r"/[A-Za-z0-9._/-]{1,200}/edgec-bench\.[A-Za-z0-9]{6,32}")
"""Where a remote worker lives: what `mktemp -d` may answer. Anything else is not used, let alone deleted."""


def quoted(words: Sequence[str]) -> str:
    """One POSIX shell command whose words arrive as they are. Raises BenchError for control characters."""
    for word in words:
        if any(ord(c) < 32 or ord(c) == 127 for c in word):
            raise BenchError(f"a remote command would hold a control character: {word!r}")
    return " ".join(shlex.quote(word) for word in words)


def assigned(environment: Mapping[str, str]) -> list[str]:
    """Words for `env`: NAME=value."""
    return [f"{name}={value}" for name, value in environment.items()]


def copy_worker(files: Sequence[str], out: Path) -> Path:
    """The worker's own files, and an empty edgec/__init__.py, in the new folder out/edgec."""
    source, target = Path(edgec.__file__).resolve().parent, out / "edgec"
    target.mkdir(parents=True)
    (target / "__init__.py").write_text("", encoding="utf-8")
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source / name, target / name)
    return target


def pushable(folder: Path) -> Path:
    """An artifact folder (or file) whose copy holds what it holds: no links, no devices. Raises BenchError."""
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root) / name
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise BenchError(f"{path}: a link or special file; only plain files are pushed to a device")
    return folder.resolve()
