"""Output appears whole or not at all: everything is written into a hidden sibling folder, synced, and renamed
into place.

One run at a time holds an output's lock; the next holder sweeps what a killed one left behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgec.errors import EdgecError, OutputError


@contextmanager
def staged_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """A fresh folder to write into, which becomes `out` when the block ends without an error and vanishes when it
    does not.

    Raises OutputError when `out` exists (unless force), when another run holds it, or when the disk is full.
    """
    out = _absolute(out)
    with _explained(out), _locked(out):
        check_free(out, force=force)
        stage = out.parent / f"{_partial(out)}{os.getpid()}"
        try:
            stage.mkdir()
            yield stage
            _sync_tree(stage)
            _replace(stage, out)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, on the disk that will hold it, for temporary files.

    For use inside `staged_folder(out)`: what a killed run leaves is swept by the next holder of its lock.
    """
    out = _absolute(out)
    folder = out.parent / f"{_partial(out)}work-{os.getpid()}"
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_free(out: Path, *, force: bool) -> None:
    """Refuse early what `staged_folder` would refuse late. Raises OutputError."""
    if os.path.lexists(out):
        if out.is_symlink() or not out.is_dir():
            raise OutputError(f"{out}: exists and is not a folder; choose another -o")
        if not force:
            raise OutputError(f"{out}: already exists; choose another -o or pass --force to replace it")
        with _explained(out):
            empty = not any(out.iterdir())
        if not empty and not any((out / name).is_file() for name in OWN_MARKERS):
            raise OutputError(
                f"{out}: --force replaces folders that edgec wrote, and this one has no {' or '.join(OWN_MARKERS)}"
            )


OWN_MARKERS = ("edgec.json", "profile.json", "frontier.json")
"""Files by which a folder is known as edgec's own."""


@contextmanager
def written_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` (replacing it) when the block ends without an error."""
    path = _absolute(path)
    temporary = path.with_name(f"{_partial(path)}{os.getpid()}")
    with _explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for orphan in _orphans(path):
                if not _alive(orphan):
                    orphan.unlink(missing_ok=True)
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.parent / f".{out.name}.lock"
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat())
        except BlockingIOError:
            ours = False
        if not ours:  # held, or removed by its holder between our open and our flock
            raise OutputError(f"{out}: another edgec run is writing it; wait for it or choose another -o")
        try:
            for orphan in _orphans(out):
                shutil.rmtree(orphan, ignore_errors=True)
            _recover(out)
            yield
        finally:
            lock.unlink(missing_ok=True)


def _partial(path: Path) -> str:
    """What the names of unfinished siblings of `path` start with; the process id follows."""
    return f".{path.name}.partial-"


def _orphans(path: Path) -> list[Path]:
    return [p for p in path.parent.iterdir() if p.name.startswith(_partial(path))]


def _alive(orphan: Path) -> bool:
    """Does the process that an unfinished file is named after still run? Files, unlike folders, are not locked."""
    try:
        os.kill(int(orphan.name.rpartition("-")[2]), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _absolute(path: Path) -> Path:
    """Without following a link at `path` itself, which `Path.resolve` would: a link is refused, not written through."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def _aside(out: Path) -> Path:
    return out.parent / f".{out.name}.replaced"


def _recover(out: Path) -> None:
    """A run killed between the two renames of `_replace` left the old output aside: put it back."""
    aside = _aside(out)
    if aside.is_dir():
        if out.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(out)


def _replace(stage: Path, out: Path) -> None:
    if out.exists():
        out.rename(_aside(out))
    stage.rename(out)
    _sync(out.parent)
    shutil.rmtree(_aside(out), ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Turns what the system refuses into an OutputError. safetensors (Rust) tells its number only in its text."""
    try:
        yield
    except EdgecError:
        raise
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number is None and not isinstance(error, OSError):
            raise
        if number in (errno.ENOSPC, errno.EDQUOT):
            reason = "no space left on the disk; nothing was changed. Free some or choose another -o"
        elif number == errno.EFBIG:
            reason = "the file-size limit is too small; nothing was changed"
        else:
            other = getattr(error, "filename", None)
            what = os.strerror(number) if number else str(error)
            reason = f"cannot be written ({what}{f': {other}' if other else ''})"
        raise OutputError(f"{out}: {reason}") from error
