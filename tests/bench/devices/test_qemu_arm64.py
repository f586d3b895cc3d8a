"""The emulated device, with a stand-in for the emulator: a program that starts this machine's Python."""

from __future__ import annotations

import base64
import json
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from edgec.bench.devices import file, open_device
from edgec.bench.devices._agreement import Answer, compared, read_answer
from edgec.bench.harness import BenchSettings, Contestant, run_bench
from edgec.errors import BenchError, UsageError

QUICK = BenchSettings(rounds=1, samples=1, warmup=0, min_sample_s=0.0, batch=2, threads=1, timeout_s=120)
_EMULATOR = """#!/bin/sh
shift 5
unset PYTHONHOME
{trouble}
exec {python} "$@"
"""


def _root(folder: Path, trouble: str = "") -> Path:
    for name in ("site", "sysroot/usr/bin"):
        (folder / name).mkdir(parents=True)
    (folder / "sysroot/usr/bin/python3.11").write_text("")
    (folder / "emulator").write_text(_EMULATOR.format(python=sys.executable, trouble=trouble))
    (folder / "emulator").chmod(stat.S_IRWXU)
    return folder


def test_memory_and_agreement_but_no_times(tmp_path: Path, encoder_folder: Path) -> None:
    odd = tmp_path / "it's $(odd)"
    device = file("qemu-arm64").create(f"{_root(odd)},cpu=max")
    (row,) = run_bench([Contestant("a", encoder_folder)], QUICK, device=device)
    assert row.device == "qemu-arm64 (max)"
    told = {"load_peak_rss_bytes", "peak_rss_bytes", "runtime_rss_bytes"}
    assert set(row.metrics) - {"mapped_rss_bytes"} == told
    assert row.metrics["peak_rss_bytes"].value > 1_000_000
    assert "times are not times" in row.notes[0]
    assert "cosine at least 1.00000 over 2 sentences" in row.notes[1]
    assert "Gather 1" in row.notes[2] and "the same as" in row.notes[2]
    assert not any(note.startswith(("failed", "incomplete")) for note in row.notes)
    assert device.describe()["python"] == ".".join(map(str, sys.version_info[:3]))


def test_an_emulator_that_crashes_fails_the_row(tmp_path: Path, encoder_folder: Path) -> None:
    device = open_device(f"qemu-arm64:{_root(tmp_path / 'root', 'echo illegal instruction >&2; exit 132')}")
    with pytest.raises(BenchError, match="exit status 132: illegal instruction"):
        run_bench([Contestant("a", encoder_folder)], QUICK, device=device)


def test_a_comparison_that_fails_is_told_and_memory_stays(tmp_path: Path, encoder_folder: Path) -> None:
    trouble = 'case "$*" in *bench.check*) echo no; exit 0;; esac'
    device = open_device(f"qemu-arm64:{_root(tmp_path / 'root', trouble)}")
    (row,) = run_bench([Contestant("a", encoder_folder)], QUICK, device=device)
    assert row.metrics["peak_rss_bytes"].value > 0
    assert any("not compared" in note and "malformed" in note for note in row.notes)


def test_what_is_no_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEC_ARM64_ROOT", raising=False)
    with pytest.raises(UsageError, match=r"python -m runtime_tests\.arm64"):
        open_device("qemu-arm64")
    with pytest.raises(UsageError, match="cpu must be one of cortex-a76, max"):
        open_device("qemu-arm64:/root,cpu=z80")
    with pytest.raises(BenchError, match="is no arm64 root"):
        open_device(f"qemu-arm64:{tmp_path}").describe()
    assert "EDGEC_ARM64_ROOT" in file("qemu-arm64").needs()[0]
    monkeypatch.setenv("EDGEC_ARM64_ROOT", str(tmp_path / "absent"))
    assert "no arm64 root" in file("qemu-arm64").needs()[0]
    monkeypatch.setenv("EDGEC_ARM64_ROOT", str(_root(tmp_path / "root")))
    assert file("qemu-arm64").needs() == ()
    (tmp_path / "root/sysroot/usr/bin/python3.11").unlink()
    assert "found 0" in file("qemu-arm64").needs()[0]


# Holding answers against each other


def _answer(values: object, operators: dict[str, int] | None = None, machine: str = "here") -> Answer:
    return Answer(machine, np.asarray(values, dtype=np.float32), operators or {})


def test_small_differences_agree_and_large_ones_do_not() -> None:
    here = _answer([[1.0, 0.0], [0.0, 2.0]])
    assert "here agree: cosine at least 0.99" in compared(here, _answer([[1.0, 0.1], [0.0, 2.0]]), "encoder")[0]
    assert compared(here, _answer([[1.0, 0.0], [2.0, 0.0]]), "encoder")[0].startswith("DISAGREES")
    assert compared(here, _answer([[0.0, 0.0], [0.0, 2.0]]), "encoder")[0].startswith("DISAGREES")
    assert "at 2 of 2 positions" in compared(here, here, "causal-lm")[0]
    far = compared(here, _answer([[0.0, 9.0], [0.0, 2.0]]), "causal-lm")[0]
    assert far.startswith("DISAGREES") and "at 1 of 2 positions" in far


def test_nan_and_shapes_never_agree() -> None:
    here = _answer([[1.0, 0.0]])
    assert "NaN" in compared(here, _answer([[np.nan, 0.0]]), "encoder")[0]
    assert "NaN" in compared(_answer([[np.inf, 0.0]]), here, "causal-lm")[0]
    assert "shapes" in compared(here, _answer([[1.0]]), "encoder")[0]


def test_operators_that_differ_are_named() -> None:
    here, there = _answer([[1.0]], {"MatMul": 3, "Gelu": 1}), _answer([[1.0]], {"MatMul": 4}, "there")
    assert compared(here, there, "encoder")[1].endswith(
        "differ from here's: Gelu 0 instead of 1, MatMul 4 instead of 3"
    )
    many = _answer([[1.0]], {f"Op{i:02}": 1 for i in range(20)})
    assert compared(many, many, "encoder")[1].endswith("and 8 more kinds")
    assert "does not tell" in compared(here, _answer([[1.0]]), "encoder")[1]


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [1, 3]},
        {"shape": [-1, -2]},
        {"shape": "x"},
        {"shape": [float("inf"), 1]},
        {"values": "*"},
        {"operators": []},
        {"operators": {"a": "b"}},
        {"values": None},
    ],
)
def test_malformed_answers_are_errors(change: dict[str, object]) -> None:
    data = base64.b64encode(np.ones(2, dtype="<f4").tobytes()).decode()
    good = {"machine": "m", "shape": [1, 2], "values": data, "operators": {"a": 1}}
    assert read_answer(json.dumps(good).encode()).values.tolist() == [[1.0, 1.0]]
    with pytest.raises(BenchError):
        read_answer(json.dumps(good | change).encode())


def test_an_error_of_the_other_side_is_told() -> None:
    with pytest.raises(BenchError, match="its head is pruned"):
        read_answer(b'{"error": "its head is pruned"}')
    for line in (b"", b"[]", b"[" * 100_000, b"\xff"):
        with pytest.raises(BenchError, match="malformed"):
            read_answer(line)
