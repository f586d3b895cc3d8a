"""Output appears whole or not at all: faults 18 and 29 to 33, each in a process of its own where it has to die."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgec.errors import OutputError, UsageError
from edgec.outputs import check_free, staged_folder, written_file


def tree(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }


def old_output(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "edgec.json").write_text("{}")
    (folder / "model.onnx").write_bytes(b"old")
    return folder


def python(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


HOLD = """
    import sys, time
    from pathlib import Path
    from edgec.outputs import staged_folder
    with staged_folder(Path(sys.argv[1]), force=True) as stage:
        (stage / "half").write_bytes(b"x" * 1000)
        print("in", flush=True)
        time.sleep(60)
"""


def killed_in_mid_write(out: Path) -> None:
    process = python(HOLD, out)
    assert process.stdout is not None
    assert process.stdout.readline() == b"in\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_finished_block_becomes_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged_folder(out) as stage:
        (stage / "sub").mkdir()
        (stage / "sub" / "file").write_text("x")
        assert not out.exists()
    assert tree(out) == {"sub": "folder", "sub/file": hashlib.sha256(b"x").hexdigest()}
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError("x"), UsageError("x"), KeyboardInterrupt()])
def test_a_failed_block_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)), staged_folder(tmp_path / "out") as stage:
        (stage / "file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_failed_block_leaves_the_old_output(tmp_path: Path) -> None:
    before = tree(old_output(tmp_path / "out"))
    with pytest.raises(ValueError, match="x"), staged_folder(tmp_path / "out", force=True) as stage:
        (stage / "file").write_text("x")
        raise ValueError("x")
    assert tree(tmp_path / "out") == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_replaces_own_folders_only(tmp_path: Path) -> None:
    own, foreign, empty = old_output(tmp_path / "own"), tmp_path / "foreign", tmp_path / "empty"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    empty.mkdir()
    for folder in (own, foreign, empty):
        with pytest.raises(OutputError, match="already exists"), staged_folder(folder):
            pass
    for folder in (own, empty):
        with staged_folder(folder, force=True) as stage:
            (stage / "new").write_text("x")
        assert list(tree(folder)) == ["new"]
    with pytest.raises(OutputError, match="this one has no edgec.json"), staged_folder(foreign, force=True):
        pass
    assert (foreign / "thesis.tex").read_text() == "years of work"


def test_files_and_links_are_not_written_through(tmp_path: Path) -> None:
    old_output(tmp_path / "target")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_text("x")
    for name in ("link", "dangling", "file"):
        for force in (False, True):
            with pytest.raises(OutputError, match="not a folder"):
                check_free(tmp_path / name, force=force)
            with pytest.raises(OutputError, match="not a folder"), staged_folder(tmp_path / name, force=force):
                pass
    with pytest.raises(OutputError, match="cannot be written"), staged_folder(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize("name", ["out", "out[1]", "-out", "ü*?"])
def test_a_killed_run_leaves_the_old_output_and_the_next_one_sweeps(name: str, tmp_path: Path) -> None:
    out = tmp_path / name
    before = tree(old_output(out))
    killed_in_mid_write(out)
    assert tree(out) == before
    assert any(".partial-" in p.name for p in tmp_path.iterdir())
    with staged_folder(out, force=True) as stage:
        (stage / "new").write_text("x")
    assert list(tree(out)) == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_run_killed_between_the_renames_is_undone(tmp_path: Path) -> None:
    out = old_output(tmp_path / "out")
    before = tree(out)
    out.rename(tmp_path / ".out.replaced")
    with pytest.raises(OutputError, match="already exists"), staged_folder(out):
        pass
    assert tree(out) == before
    (tmp_path / ".out.replaced").mkdir()  # killed after both renames, before the old one was removed
    with staged_folder(out, force=True) as stage:
        (stage / "new").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_second_run_is_refused_while_the_first_one_writes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = python(HOLD, out)
    assert process.stdout is not None
    assert process.stdout.readline() == b"in\n"
    with pytest.raises(OutputError, match="another edgec run"), staged_folder(out):
        pass
    assert any(".partial-" in p.name for p in tmp_path.iterdir())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with staged_folder(out):
        pass
    assert out.is_dir()


def test_only_one_of_many_runs_at_once_writes(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from edgec.errors import OutputError
        from edgec.outputs import staged_folder
        out, log = Path(sys.argv[1]), Path(sys.argv[2])
        while time.time() < float(sys.argv[3]):
            pass
        for attempt in range(30):
            try:
                with staged_folder(out, force=True) as stage:
                    mine = log / "inside"
                    mine.mkdir()  # fails when two are inside
                    (stage / "edgec.json").write_text("{}")
                    mine.rmdir()
            except OutputError as error:
                assert "another edgec run" in str(error), error
    """
    (tmp_path / "log").mkdir()
    start = time.time() + 1.0
    runs = [python(code, tmp_path / "out", tmp_path / "log", start) for _ in range(3)]
    for process in runs:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "out"]


@pytest.mark.parametrize("writer", ["file.write_bytes(b'x' * 200_000)", "save_file({'a': np.ones(100_000)}, file)"])
def test_a_file_size_limit_leaves_the_old_output(writer: str, tmp_path: Path) -> None:
    """Rust's writer does not raise OSError, and its message must not reach the user as a traceback."""
    out = old_output(tmp_path / "out")
    before = tree(out)
    code = f"""
        import resource, sys
        from pathlib import Path
        import numpy as np
        from safetensors.numpy import save_file
        from edgec.errors import OutputError
        from edgec.outputs import staged_folder
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            with staged_folder(Path(sys.argv[1]), force=True) as stage:
                file = stage / "model"
                {writer}
        except OutputError as error:
            print(error)
    """
    printed, errors = python(code, out).communicate(timeout=60)
    assert printed.decode().strip().endswith("file-size limit is too small; nothing was changed"), errors.decode()
    assert tree(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_told_from_other_refusals(tmp_path: Path) -> None:
    for error, told in [
        (OSError(28, "No space left on device"), "no space left"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left"),
        (PermissionError(13, "Permission denied", "/x/y"), "Permission denied: /x/y"),
        (OSError("a library's own words"), "a library's own words"),
    ]:
        with pytest.raises(OutputError, match=told), staged_folder(tmp_path / "out"):
            raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"), staged_folder(tmp_path / "out"):
            pass
    finally:
        tmp_path.chmod(0o700)


# One file


def test_a_file_is_replaced_or_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    with written_file(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(ValueError, match="x"), written_file(path) as temporary:
        temporary.write_text("half")
        raise ValueError("x")
    assert path.read_text() == "one"
    with written_file(path) as temporary:
        temporary.write_text("two")
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_block_that_writes_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"), written_file(tmp_path / "x"):
        pass


def test_a_killed_writer_of_a_file_is_swept(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from edgec.outputs import written_file
        with written_file(Path(sys.argv[1])) as temporary:
            temporary.write_text("half")
            print("in", flush=True)
            time.sleep(60)
    """
    path = tmp_path / "report.html"
    process = python(code, path)
    assert process.stdout is not None
    assert process.stdout.readline() == b"in\n"
    with written_file(path) as temporary:  # the other one is alive: its file stays
        temporary.write_text("mine")
    assert len(list(tmp_path.iterdir())) == 2
    process.kill()
    process.communicate()
    with written_file(path) as temporary:
        temporary.write_text("again")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "again"


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """What is synced, and what gets another name (by its new one), in order."""
    seen: list[tuple[str, Path]] = []
    sync = os.fsync

    def synced(handle: int) -> None:
        seen.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}"))))  # noqa: PTH115 - the text, not the file
        sync(handle)

    def renaming(original: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def renamed(self: Path, target: Path) -> Path:
            seen.append(("rename", target))
            return original(self, target)

        return renamed

    monkeypatch.setattr(os, "fsync", synced)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, renaming(getattr(Path, name)))
    return seen


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells a handle's path")
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_is_on_the_disk_before_it_has_its_name(
    force: bool, tmp_path: Path, events: list[tuple[str, Path]]
) -> None:
    """Else a power loss could leave the name with empty files behind it."""
    out = old_output(tmp_path / "out") if force else tmp_path / "out"
    with staged_folder(out, force=force) as stage:
        (stage / "sub").mkdir()
        (stage / "sub" / "file").write_text("x")
    at = events.index(("rename", out))
    assert {path for kind, path in events[:at] if kind == "sync"} == {stage, stage / "sub", stage / "sub" / "file"}
    assert ("sync", tmp_path) in events[at:]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells a handle's path")
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, events: list[tuple[str, Path]]) -> None:
    with written_file(tmp_path / "plan.yaml") as temporary:
        temporary.write_text("x")
    assert events == [("sync", temporary), ("rename", tmp_path / "plan.yaml"), ("sync", tmp_path)]
