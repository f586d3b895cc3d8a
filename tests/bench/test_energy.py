"""Energy from a sysfs tree that the test writes: what is counted, what wraps, what may not be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgec.bench import energy


def zone(root: Path, name: str, kind: str, uj: int, most: int = 262_143_328_850) -> Path:
    folder = root / "powercap" / name
    folder.mkdir(parents=True)
    for file, text in (("name", kind), ("energy_uj", uj), ("max_energy_range_uj", most)):
        (folder / file).write_text(f"{text}\n")
    return folder


def supply(root: Path, **files: object) -> Path:
    folder = root / "power_supply" / "BAT0"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")
    return folder


def test_packages_and_their_memory_are_added_and_nothing_twice(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 500_000)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 100)
    zone(tmp_path, "intel-rapl:1", "psys", 5)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000)
    meter, told = energy.find(tmp_path)
    assert meter is not None and told == "RAPL package-0 + dram, whole processor"
    mark = meter.mark()
    (package / "energy_uj").write_text("3500000")
    (memory / "energy_uj").write_text("250100")
    (tmp_path / "powercap" / "intel-rapl:0:0" / "energy_uj").write_text("99999999")
    assert meter.joules(mark) == pytest.approx(2.75)


def test_a_counter_that_wraps(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000, most=10_000_000)
    meter, _ = energy.find(tmp_path)
    assert meter is not None
    mark = meter.mark()
    (package / "energy_uj").write_text("500000")
    assert meter.joules(mark) == pytest.approx(1.5)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_counters_that_only_root_may_read_by_permission(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (package / "energy_uj").chmod(0)
    assert energy.find(tmp_path) == (None, "this machine does not tell: RAPL is readable by root only")


def test_counters_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two packages one is refused: their sum would be too small, so there is none."""
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    refused = zone(tmp_path, "intel-rapl:1", "package-1", 1)
    read = Path.read_text

    def guarded(path: Path, **options: str) -> str:
        if path == refused / "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path, **options)

    monkeypatch.setattr(Path, "read_text", guarded)
    meter, told = energy.find(tmp_path)
    assert meter is None and told == "this machine does not tell: RAPL is readable by root only"


@pytest.mark.parametrize(
    "files", [{"power_now": 4_000_000}, {"current_now": -1_000_000, "voltage_now": 4_000_000}], ids=["power", "current"]
)
def test_a_discharging_battery(tmp_path: Path, files: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """4 W over half a second; some drivers give the current of a discharge as a negative number."""
    supply(tmp_path, type="Battery", status="Discharging", **files)
    meter, told = energy.find(tmp_path)
    assert meter is not None and told == "battery, whole device"
    clock = iter([10.0, 10.5])
    monkeypatch.setattr(energy.time, "perf_counter", lambda: next(clock))
    assert meter.joules(meter.mark()) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "files",
    [
        {"type": "Mains", "status": "Discharging", "power_now": 1},
        {"type": "Battery", "status": "Charging", "power_now": 1},
        {"type": "Battery", "status": "Discharging", "power_now": "much"},
        {"type": "Battery", "status": "Discharging"},
    ],
)
def test_what_is_no_meter(tmp_path: Path, files: dict[str, object]) -> None:
    supply(tmp_path, **files)
    assert energy.find(tmp_path) == (None, "this machine does not tell")


def test_a_machine_without_any(tmp_path: Path) -> None:
    assert energy.find(tmp_path) == (None, "this machine does not tell")


def test_macos_says_what_it_would_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy.sys, "platform", "darwin")
    assert energy.find(tmp_path) == (None, "this machine does not tell: powermetrics needs root")
