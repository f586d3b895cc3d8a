"""Ctrl-C, SIGKILL, full disks and rivals in mid-export: earlier output is untouched, and a re-run works."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import killed_for_tests
import pytest
from command_for_tests import TIMEOUT_S, check_failure, finish, invoke, start, wait_for
from models_for_tests import tree

from edgec import healing, pipeline
from edgec.export.onnx import exporter
from edgec.heal.settings import parse_heal
from edgec.outputs import written_file
from edgec.pipeline import exporting, stages
from edgec.plan.refine import Search

pytestmark = pytest.mark.slow

PLAN = ("--plan", "uniform:0.5", "--plain", "--no-quality")


def _words(source: Path, out: Path) -> tuple[str | Path, ...]:
    return ("export", source, "-t", "onnx-x64", *PLAN, "-o", out, "--force")


@pytest.fixture(scope="session")
def whole(lm_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an undisturbed run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    pipeline.export(pipeline.ExportRequest(lm_source, "onnx-x64", out, plan="uniform:0.5", plain=True, quality=False))
    return tree(out)


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """Holds an earlier output."""
    earlier = tmp_path / "room" / "out"
    earlier.mkdir(parents=True)
    (earlier / "edgec.json").write_text("{}", encoding="utf-8")
    (earlier / "model.onnx").write_bytes(b"earlier")
    return earlier.parent


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start`, and whatever still runs at the end is stopped."""
    running = []

    def begin(*words: str | Path, **options: Any) -> subprocess.Popen[str]:
        running.append(start(*words, **options))
        return running[-1]

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_in_mid_export_leaves_nothing(
    started: Callable[..., subprocess.Popen[str]],
    lm_source: Path,
    room: Path,
    number: signal.Signals,
    code: int,
) -> None:
    before = tree(room)
    process = started(*_words(lm_source, room / "out"))
    wait_for(process, room, ".out.partial-*")
    process.send_signal(number)
    said = finish(process)
    assert said.code == code, said
    assert "Traceback" not in said.err
    if number == signal.SIGINT:
        check_failure(said, 130, r"interrupted; no output was changed")
    assert tree(room) == before


def test_a_killed_export_leaves_only_hidden_files_and_the_next_run_sweeps_them(
    started: Callable[..., subprocess.Popen[str]],
    lm_source: Path,
    room: Path,
    whole: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = tree(room)
    process = started(*_words(lm_source, room / "out"))
    wait_for(process, room, ".out.partial-work-*")
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    left = tree(room)
    assert {name: left[name] for name in before} == before
    assert all(name.startswith(".out.") for name in set(left) - set(before))
    assert set(left) != set(before), "killed too late to leave anything"
    assert invoke(capsys, *_words(lm_source, room / "out")).code == 0
    assert tree(room) == {"out": "dir", **{f"out/{name}": digest for name, digest in whole.items()}}


PLANNED = (
    "building the graph", "calibrating", "scoring", "trying plans", "drafting", "writing", "fitting block by block",
)  # fmt: skip
GIVEN = ("fitting", "writing", "healing", "verifying")


def test_a_run_killed_at_any_stage_leaves_the_old_output_and_the_next_run_succeeds(
    lm_source: Path, text_file: Path, room: Path
) -> None:
    """The stages of an export that looks for its plan, and those of one that heals a given one, in processes forked
    from one that has imported edgec and run nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["edgec.pipeline"])
    request = pipeline.ExportRequest(lm_source, "onnx-x64", room / "out", calibration=text_file, force=True)
    planned = replace(request, budget="0.6", search=Search("greedy", evaluations=2))
    given = replace(request, plan="uniform:0.5", plain=True, heal=parse_heal("2steps"))

    def ends(request: pipeline.ExportRequest, last: str = "") -> int | None:
        process = context.Process(target=killed_for_tests.export, args=(request, last))
        process.start()
        try:
            process.join(TIMEOUT_S)
            return process.exitcode
        finally:
            process.kill()
            process.join()

    before = tree(room)
    for request, last in [*((planned, stage) for stage in PLANNED), *((given, stage) for stage in GIVEN)]:
        assert ends(request, last) == -signal.SIGKILL, f"{last} was not reached"
        left = tree(room)
        assert {name: left[name] for name in before} == before, last
        assert all(name.startswith(".out.") for name in set(left) - set(before)), last
    assert ends(given) == 0
    assert [path.name for path in room.iterdir()] == ["out"] and (room / "out" / "model.onnx").is_file()


def test_a_killed_healing_goes_on_where_it_was(
    started: Callable[..., subprocess.Popen[str]],
    lm_source: Path,
    text_file: Path,
    room: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The state is of the first tenth of the run; a run of one step that takes it up has no more to do."""

    def words(heal: str) -> tuple[str | Path, ...]:
        return (*_words(lm_source, room / "out"), "--calibration", text_file, "--heal", heal)

    process = started(*words("2000steps"))
    wait_for(process, room, ".out.heal.safetensors")
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    assert invoke(capsys, *words("1steps")).code == 0
    manifest = json.loads((room / "out" / "edgec.json").read_text(encoding="utf-8"))
    resumed = re.search(r"resumed at step (\d+)", manifest["healing"]["note"])
    assert resumed and int(resumed[1]) >= 200, manifest["healing"]
    assert [path.name for path in room.iterdir()] == ["out"]


def test_a_second_run_into_the_same_output_exits_and_the_first_succeeds(
    started: Callable[..., subprocess.Popen[str]],
    lm_source: Path,
    room: Path,
    whole: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = started(*_words(lm_source, room / "out"))
    wait_for(first, room, ".out.partial-*")
    second = invoke(capsys, *_words(lm_source, room / "out"))
    assert first.poll() is None, "the first was too quick to meet"
    check_failure(second, 1, r"out: another edgec run is writing it; wait for it or choose another -o")
    assert finish(first).code == 0
    assert tree(room) == {"out": "dir", **{f"out/{name}": digest for name, digest in whole.items()}}


def test_a_file_size_limit(started: Callable[..., subprocess.Popen[str]], lm_source: Path, room: Path) -> None:
    before = tree(room)
    limit = 60_000  # the tokenizer and the graph pass, the weights do not

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    said = finish(started(*_words(lm_source, room / "out"), prepare=prepare))
    check_failure(said, 1, r"out: the file-size limit is too small; nothing was changed")
    assert tree(room) == before


def test_a_full_disk(
    capsys: pytest.CaptureFixture[str], lm_source: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the weights, after part of them is on the disk."""
    save = exporter.save_model

    def fail(*arguments: Any, **options: Any) -> Any:
        save(*arguments, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(exporter, "save_model", fail)
    before = tree(room)
    said = invoke(capsys, *_words(lm_source, room / "out"))
    check_failure(said, 1, r"out: no space left on the disk; nothing was changed. Free some or choose another -o")
    assert tree(room) == before


def test_a_really_full_disk(started: Callable[..., subprocess.Popen[str]], lm_source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "edgec-test", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small disk here (needs root)")
    try:
        said = finish(started(*_words(lm_source, disk / "out")))
        check_failure(said, 1, r"out: no space left on the disk")
        assert tree(disk) == {}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_model_that_does_not_verify_is_not_written(
    capsys: pytest.CaptureFixture[str], lm_source: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN included: the gate is `not error <= tolerance`."""
    before = tree(room)
    for wrong in (0.5, float("nan")):
        monkeypatch.setattr("edgec.export.verify.relative", lambda *_, wrong=wrong: wrong)
        said = invoke(capsys, *_words(lm_source, room / "out"))
        check_failure(said, 1, r"verify: the exported graph differs from the compressed model by (5\.00e-01|nan)")
        assert tree(room) == before


def test_memory_that_a_profile_cannot_have_is_told_before_it_is_measured(
    capsys: pytest.CaptureFixture[str], lm_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "bytes_needed", lambda layers, pooled: 10**15)
    said = invoke(capsys, "profile", lm_source, "-o", tmp_path / "out")
    check_failure(said, 1, r"statistics of all layers need about 1000000\.0 GB .* are free; .*compress")
    assert not (tmp_path / "out").exists()


def test_memory_that_healing_cannot_have_is_told_before_it_begins(
    capsys: pytest.CaptureFixture[str], lm_source: Path, text_file: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing, "_BYTES_PER_PARAMETER", 10**12)
    before = tree(room)
    said = invoke(capsys, *_words(lm_source, room / "out"), "--calibration", text_file, "--heal", "2steps")
    check_failure(said, 1, r"healing needs about \d+\.\d GB of memory and .* are free; use --heal off")
    assert tree(room) == before


def test_out_of_memory_and_bugs_are_one_line_too(
    capsys: pytest.CaptureFixture[str], lm_source: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(error: BaseException) -> Callable[..., Any]:
        def fail(*_: Any, **__: Any) -> Any:
            raise error

        return fail

    before = tree(room)
    monkeypatch.setattr(pipeline, "measure_quality", lambda *_: {})
    for error, code, message in (
        (MemoryError(), 1, r"out of memory"),
        (KeyboardInterrupt(), 130, r"interrupted"),
        (ZeroDivisionError("a\nbug"), 70, r"internal error: ZeroDivisionError: a bug .*--debug"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory"),
            1,
            r"out of memory",
        ),
    ):
        monkeypatch.setattr(exporting, "verified_manifest", raising(error))
        check_failure(invoke(capsys, *_words(lm_source, room / "out")), code, message)
        assert tree(room) == before


def test_debug_shows_where_a_failure_came_from(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = invoke(capsys, "inspect", tmp_path / "nowhere", "--debug")
    assert said.code == 1
    assert said.err.splitlines()[-1].startswith("edgec: error: ")
    process = finish(start("inspect", tmp_path / "nowhere", "--debug"))
    assert "Traceback (most recent call last)" in process.err
    assert "CheckpointError" in process.err


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "plan.yaml"
    target.write_text("old", encoding="utf-8")
    with pytest.raises(ZeroDivisionError), written_file(target) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise ZeroDivisionError
    assert tree(tmp_path).keys() == {"plan.yaml"}
    assert target.read_text(encoding="utf-8") == "old"
