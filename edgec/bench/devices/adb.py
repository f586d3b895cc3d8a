"""An Android device through adb: `adb:SERIAL`, a serial as `adb devices` lists it.

Written against adb's documented protocol and tested against a stand-in; not yet tried on hardware, which every row
says. What is copied goes into one new folder under /data/local/tmp (see `_line`). Android has no Python of its own:
EDGEC_ADB_PYTHON names one that was pushed to the device, with numpy and the artifact's runtime beside it. Termux's
Python is out of reach, since Android lets no other user into an application's files: `run-as` would let us in, but not
to our own folder. With Termux's sshd, the device `ssh` measures it (EDGEC_SSH_TMP).

adb joins its arguments into one string for the device's shell, so a command is one quoted word (`_remote.quoted`).
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from edgec.bench.devices._line import LineDevice
from edgec.errors import UsageError

PLUGIN = True
USAGE = "adb:SERIAL"

_SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,99}")


def create(argument: str) -> AdbDevice:
    """Raises UsageError for what can be no serial; nothing is connected yet."""
    if not _SERIAL.fullmatch(argument):
        raise UsageError(
            f"device 'adb:{argument}': expected adb:SERIAL as `adb devices` lists it, letters, digits, dots, colons "
            "and dashes"
        )
    return AdbDevice(argument)


def needs() -> tuple[str, ...]:
    missing = []
    if shutil.which("adb") is None:
        missing.append("the program 'adb' (Android's platform-tools) is missing")
    if not os.environ.get("EDGEC_ADB_PYTHON"):
        missing.append("EDGEC_ADB_PYTHON: a Python 3.11 on the device, with numpy and the artifact's runtime")
    return tuple(missing)


class AdbDevice(LineDevice):
    """One Android device."""

    notes = ("this kind of device has not been tried on hardware yet",)

    def __init__(self, serial: str) -> None:
        super().__init__("/data/local/tmp")
        self._serial = serial
        self.name = f"adb:{serial}"

    def command(self, command: str) -> list[str]:
        """-T: no terminal, so that stdin, stdout and stderr stay apart and the exit status comes back (Android 7)."""
        return ["adb", "-s", self._serial, "shell", "-T", command]

    def copying(self, source: Path, target: str) -> list[str]:
        return ["adb", "-s", self._serial, "push", str(source), target]

    def python(self) -> str:
        return os.environ.get("EDGEC_ADB_PYTHON") or "python3"
