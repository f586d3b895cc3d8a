"""An Android device behind a stand-in for adb: a program that pushes into a folder and hands commands to a real shell.

What it takes from the protocol: `-s SERIAL` first; `shell` joins its arguments with spaces and gives them to sh, whose
exit status comes back; `push` makes the target folder and says on stdout what it copied; an unknown serial is an error.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
from processes_for_tests import ended

from edgec.bench.devices import adb, file, open_device
from edgec.bench.harness import BenchSettings, Contestant, run_bench
from edgec.bench.jobs import Job
from edgec.errors import BenchError, UsageError

QUICK = BenchSettings(rounds=1, samples=1, warmup=0, min_sample_s=0.0, batch=2, threads=1, timeout_s=120)
_ADB = """#!{python}
import os, shutil, sys
with open({log!r}, "a") as log:
    print(sys.argv[1:], file=log)
option, serial, verb, *rest = sys.argv[1:]
assert option == "-s"
if serial != "R58M123ABC":
    sys.exit(f"adb: device '{{serial}}' not found")
there = lambda path: path.replace("/data/local/tmp", {storage!r})
{trouble}
if verb == "push":
    source, target = rest
    shutil.copytree(source, there(target)) if os.path.isdir(source) else shutil.copy(source, there(target))
    print(source + ": 9 files pushed, 0 skipped.")
else:
    assert verb == "shell" and rest.pop(0) == "-T"
    os.execvp("sh", ["sh", "-c", there(" ".join(rest))])
"""


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The device's /data/local/tmp; a program named adb comes before any other."""
    (tmp_path / "storage").mkdir()
    return _stand_in(tmp_path, monkeypatch)


def _stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str = "") -> Path:
    programs, storage = tmp_path / "programs", tmp_path / "storage"
    programs.mkdir(exist_ok=True)
    storage.mkdir(exist_ok=True)
    text = _ADB.format(python=sys.executable, log=str(tmp_path / "log"), storage=str(storage), trouble=trouble)
    (programs / "adb").write_text(text)
    (programs / "adb").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("EDGEC_ADB_PYTHON", sys.executable)
    return storage


@pytest.mark.parametrize(
    "name", ["", "-s", "--help", "a b", "a;id", "$(id)", "`id`", "a\nb", "a/b", "..", "x" * 101, "a'b", "ä"]
)
def test_what_is_no_serial_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="expected adb:SERIAL"):
        open_device(f"adb:{name}")


def test_serials_as_adb_lists_them() -> None:
    for name in ("R58M123ABC", "emulator-5554", "192.168.1.5:5555", "adb-1A2B-x._adb-tls-connect._tcp"):
        assert open_device(f"adb:{name}").name == f"adb:{name}"


def test_an_android_device_measures(storage: Path, encoder_folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "it's $(touch owned) ; `id` & name"
    shutil.copytree(encoder_folder, odd)
    device = adb.create("R58M123ABC")
    rows = run_bench([Contestant("a", encoder_folder), Contestant("b", odd)], QUICK, device=device)
    assert [row.device for row in rows] == ["adb:R58M123ABC"] * 2
    assert all(row.metrics["items_s"].value > 0 for row in rows)
    assert all("not been tried on hardware" in row.notes[0] for row in rows)
    assert not any("failed" in note or "incomplete" in note for row in rows for note in row.notes)
    (folder,) = storage.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["artifact0", "artifact1", "edgec", "worker.pid"]
    assert device.describe()["python"] == ".".join(map(str, sys.version_info[:3]))
    device.close()
    assert not list(storage.iterdir())
    assert not list(tmp_path.rglob("owned"))


def test_a_device_that_is_not_there(storage: Path, encoder_folder: Path) -> None:
    with pytest.raises(BenchError, match=r"adb:R0 *: mktemp failed there: exit status 1: adb: device 'R0' not found"):
        run_bench([Contestant("a", encoder_folder)], QUICK, device=open_device("adb:R0"))


def test_endless_answers_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(tmp_path, monkeypatch, trouble='os.execvp("yes", ["yes", "far"])')
    with pytest.raises(BenchError, match="wrote more than"):
        adb.create("R58M123ABC").describe()


def test_endless_output_of_the_worker_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder_folder: Path
) -> None:
    _stand_in(tmp_path, monkeypatch, trouble='if "bench.worker" in rest[-1]: os.execvp("yes", ["yes", "far"])')
    device = adb.create("R58M123ABC")
    with pytest.raises(BenchError, match="not JSON"):
        run_bench([Contestant("a", encoder_folder)], QUICK, device=device)
    device.close()


def test_a_device_that_is_unplugged_keeps_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder_folder: Path
) -> None:
    """After the first sample adb ends with 255, and nothing reaches the device any more; neither does the clean-up."""
    gone = tmp_path / "gone"
    trouble = (
        f"if os.path.exists({str(gone)!r}): sys.exit('error: device offline')\n"
        'if "bench.worker" in rest[-1]:\n'
        '    os.system("sh -c " + __import__("shlex").quote(there(rest[-1])) + " | head -n 3")\n'
        f"    open({str(gone)!r}, 'w').close()\n"
        '    sys.stderr.write("error: closed"); sys.stderr.flush(); os._exit(255)\n'
    )
    storage = _stand_in(tmp_path, monkeypatch, trouble=trouble)
    settings = BenchSettings(rounds=2, samples=2, warmup=0, min_sample_s=0.0, batch=2, threads=1, timeout_s=120)
    device = adb.create("R58M123ABC")
    (row,) = run_bench([Contestant("a", encoder_folder)], settings, device=device)
    assert row.metrics["items_s"].n == 1
    told = [note for note in row.notes if note.startswith("incomplete")]
    assert "error: closed" in told[0] and "1 of 2 samples kept" in told[0]
    assert "device offline" in told[1]
    device.close()
    assert len(list(storage.iterdir())) == 1  # out of reach


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("setsid") is None, reason="reads /proc, needs setsid")
def test_a_worker_that_hangs_is_ended_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder_folder: Path
) -> None:
    own_session = 'if verb == "shell": os.execvp("setsid", ["setsid", "sh", "-c", there(rest[-1])])'
    _stand_in(tmp_path, monkeypatch, trouble=own_session)
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path / 'stuck.pid'}\n"
        f"exec {sys.executable} -c 'import time; time.sleep(100)' edgec.bench.worker\n"
    )
    python.chmod(stat.S_IRWXU)
    monkeypatch.setenv("EDGEC_ADB_PYTHON", str(python))
    device = adb.create("R58M123ABC")
    finished = device.measure(
        Job(str(encoder_folder), "encoder", 1, sentences=("a",)), timeout_s=2, on_line=lambda line: True
    )
    assert finished.stopped == "timeout"
    assert ended(int((tmp_path / "stuck.pid").read_text()))
    device.close()


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("EDGEC_ADB_PYTHON", raising=False)
    missing = file("adb").needs()
    assert len(missing) == 2 and "platform-tools" in missing[0] and "EDGEC_ADB_PYTHON" in missing[1]
