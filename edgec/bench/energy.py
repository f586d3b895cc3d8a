"""Joules, where the machine tells: RAPL counters or a discharging battery on Linux; nothing is estimated.

RAPL (the kernel's `powercap` interface) counts what the processor packages and their memory take, all processes
together: the machine must be otherwise idle for the figure to be this model's, and idle power is not subtracted. The
counters are coarse (about a millisecond) and wrap. A battery tells the power of the whole device, once every second or
so; power at both ends of a sample times its length is the best that can be had from it. macOS tells through
`powermetrics`, which only root may run: turned down, since a benchmark should not be run as root for it.

Standard library only: it runs in the worker, on the device.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

SYSFS = Path("/sys/class")
_UNTOLD = "this machine does not tell"
_DRAM, _PACKAGE = "dram", "package-"


class Meter(Protocol):
    """Energy of a stretch of time."""

    def mark(self) -> Any:
        """The start of a stretch."""
        ...

    def joules(self, mark: Any) -> float:
        """Since `mark`."""
        ...


def find(root: Path = SYSFS) -> tuple[Meter | None, str]:
    """The best meter of this machine and what it measures; None and why there is none. root: sysfs's `class` folder."""
    if sys.platform == "darwin":
        return None, f"{_UNTOLD}: powermetrics needs root"
    zones, refused = _zones(root / "powercap")
    if zones:
        return Rapl(zones), f"RAPL {' + '.join(zone.name for zone in zones)}, whole processor"[:64]
    for supply in sorted((root / "power_supply").glob("*")):
        if _text(supply / "type") == "Battery" and _text(supply / "status") == "Discharging":
            watts = _watts(supply)
            if watts is not None:
                return Battery(watts), "battery, whole device"
    return None, f"{_UNTOLD}: RAPL is readable by root only" if refused else _UNTOLD


@dataclass(frozen=True)
class Zone:
    """One RAPL counter. range_uj: the value after which it starts from zero again [µJ]."""

    name: str
    path: Path
    range_uj: int

    def read(self) -> int:
        return int((self.path / "energy_uj").read_text(encoding="ascii"))


class Rapl:
    """Packages and their memory; subzones of a package other than memory are part of it already."""

    def __init__(self, zones: Sequence[Zone]) -> None:
        self.zones = tuple(zones)

    def mark(self) -> list[int]:
        return [zone.read() for zone in self.zones]

    def joules(self, mark: list[int]) -> float:
        """A counter that wrapped did so once: they take minutes at the least."""
        total = 0
        for zone, before in zip(self.zones, mark, strict=True):
            passed = zone.read() - before
            total += passed if passed >= 0 else passed + zone.range_uj
        return total / 1e6


class Battery:
    """watts: what flows out of the battery just now."""

    def __init__(self, watts: Callable[[], float]) -> None:
        self._watts = watts

    def mark(self) -> tuple[float, float]:
        return time.perf_counter(), self._watts()

    def joules(self, mark: tuple[float, float]) -> float:
        begun, watts = mark
        return (time.perf_counter() - begun) * (watts + self._watts()) / 2


def _zones(folder: Path) -> tuple[list[Zone], bool]:
    """(counters that may be read and do not overlap, is there one that may not be read?). The `intel-rapl-mmio` zones
    count the same packages once more, `psys` the whole board with the packages in it: both are left out.
    """
    found, refused = [], False
    for path in sorted(folder.glob("intel-rapl:*")):
        name = _text(path / "name")
        if not (name.startswith(_PACKAGE) or name == _DRAM):
            continue
        try:
            zone = Zone(name, path, int(_text(path / "max_energy_range_uj") or 0))
            zone.read()
        except PermissionError:
            refused = True
            continue
        except (OSError, ValueError):
            continue
        if zone.range_uj > 0:
            found.append(zone)
    # Memory alone is not what a token costs; a package that could not be read would be missing from the sum.
    whole = not refused and any(zone.name.startswith(_PACKAGE) for zone in found)
    return (found if whole else []), refused


def _watts(supply: Path) -> Callable[[], float] | None:
    """A function that reads the power of a battery, from whichever of its files this driver has [W]."""

    def power() -> float:
        return abs(int(_read(supply / "power_now"))) / 1e6

    def product() -> float:
        return abs(int(_read(supply / "current_now")) * int(_read(supply / "voltage_now"))) / 1e12

    for function in (power, product):
        try:
            if function() > 0:
                return function
        except (OSError, ValueError):
            continue
    return None


def _text(path: Path) -> str:
    """A file's one line; "" where it cannot be read."""
    try:
        return _read(path)
    except OSError:
        return ""


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii", errors="replace").strip()
