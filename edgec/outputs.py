"""Output appears whole or not at all: everything is written into a hidden sibling folder, synced, and renamed
into place.

One run at a time holds an output's lock; the next holder sweeps what a killed one left behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgec.errors import OutputError


@contextmanager
def staged_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """A fresh folder to write into, which becomes `out` when the block ends without an error and vanishes when it
    does not.

    Raises OutputError when `out` exists (unless force), when another run holds it, or when the disk is full.
    """
    out = _absolute(out)
    with _locked(out):
        check_free(out, force=force)
        stage = out.parent / f".{out.name}.partial-{os.getpid()}"
        try:
            stage.mkdir()
            yield stage
            _sync_tree(stage)
            _replace(stage, out)
        except OSError as error:
            raise _explained(error, out) from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def check_free(out: Path, *, force: bool) -> None:
    """Refuse early what `staged_folder` would refuse late. Raises OutputError."""
    if os.path.lexists(out):
        if out.is_symlink() or not out.is_dir():
            raise OutputError(f"{out}: exists and is not a folder; choose another -o")
        if not force:
            raise OutputError(f"{out}: already exists; choose another -o or pass --force to replace it")
        if any(out.iterdir()) and not any((out / name).is_file() for name in OWN_MARKERS):
            raise OutputError(
                f"{out}: --force replaces folders that edgec wrote, and this one has no {' or '.join(OWN_MARKERS)}"
            )


OWN_MARKERS = ("edgec.json", "profile.json")
"""Files by which a folder is known as edgec's own."""


@contextmanager
def written_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` (replacing it) when the block ends without an error."""
    path = _absolute(path)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = out.parent / f".{out.name}.lock"
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"{out}: another edgec run is writing it; wait for it or choose another -o") from None
            for orphan in out.parent.glob(f".{out.name}.partial-*"):
                shutil.rmtree(orphan, ignore_errors=True)
            _recover(out)
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise _explained(error, out) from error


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


def _explained(error: OSError, out: Path) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{out}: no space left on the disk; nothing was changed. Free some or choose another -o")
    if error.errno == errno.EFBIG:
        return OutputError(f"{out}: the file-size limit is too small; nothing was changed")
    return OutputError(f"{out}: cannot be written ({error.strerror or error})")
