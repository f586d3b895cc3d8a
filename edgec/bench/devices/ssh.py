"""Another machine through OpenSSH: `ssh:user@host`, `ssh:host:2222`. A Raspberry Pi, a Jetson, a Mac, a server.

It needs Python 3.11 with numpy and the artifact's runtime, and nothing of edgec (see `_line`): what is copied goes
into one new folder there. OpenSSH's own client is used, so keys, jump hosts and host checks are what
~/.ssh/config says; it never asks a question (BatchMode). A Python library for SSH was turned down: it would bring its
own idea of keys and known hosts.

Environment variables: EDGEC_SSH_CONFIG, a file in place of ~/.ssh/config; EDGEC_SSH_PYTHON, the interpreter there
(default python3); EDGEC_SSH_TMP, where folders are made there (default /tmp, which a phone's Termux does not have:
/data/data/com.termux/files/usr/tmp).
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from edgec.bench.devices._line import LineDevice
from edgec.errors import UsageError

PLUGIN = True
USAGE = "ssh:[user@]host[:port]"

_TARGET = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})@)?"
    r"(?P<host>[A-Za-z0-9][A-Za-z0-9.-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
_TEMPORARY = re.compile(r"(?:/[A-Za-z0-9._-]{1,100}){1,10}")


def create(argument: str) -> SshDevice:
    """Raises UsageError for what is no [user@]host[:port]; nothing is connected yet."""
    match = _TARGET.fullmatch(argument)
    if match is None or not 0 < int(match["port"] or 22) < 1 << 16:
        raise UsageError(f"device 'ssh:{argument}': expected ssh:[user@]host[:port], letters, digits, dots and dashes")
    temporary = os.environ.get("EDGEC_SSH_TMP") or "/tmp"  # noqa: S108 - on the device, for mktemp
    if not _TEMPORARY.fullmatch(temporary) or ".." in temporary:
        raise UsageError(f"EDGEC_SSH_TMP {temporary!r}: expected an absolute path of letters, digits, dots and dashes")
    host = match["host"].strip("[]")
    return SshDevice(f"{match['user']}@{host}" if match["user"] else host, int(match["port"] or 0), temporary)


def needs() -> tuple[str, ...]:
    missing = [name for name in ("ssh", "scp") if shutil.which(name) is None]
    return tuple(f"the program {name!r} (OpenSSH's client) is missing" for name in missing)


class SshDevice(LineDevice):
    """One machine that OpenSSH reaches."""

    def __init__(self, target: str, port: int, temporary: str) -> None:
        super().__init__(temporary)
        self._target, self._port = target, port
        self.name = f"ssh:{target}" + (f":{port}" if port else "")

    def command(self, command: str) -> list[str]:
        port = ["-p", str(self._port)] if self._port else []
        return ["ssh", "-T", *_options(), *port, "--", self._target, command]

    def copying(self, source: Path, target: str) -> list[str]:
        user, _, tail = self._target.rpartition("@")
        where = f"[{tail}]" if ":" in tail else tail
        host = f"{user}@{where}" if user else where
        port = ["-P", str(self._port)] if self._port else []
        return ["scp", "-B", "-q", "-r", *_options(), *port, str(source), f"{host}:{target}"]

    def python(self) -> str:
        return os.environ.get("EDGEC_SSH_PYTHON") or "python3"


def _options() -> list[str]:
    config = os.environ.get("EDGEC_SSH_CONFIG", "")
    chosen = ["-F", str(Path(config).absolute())] if config else []
    return [*chosen, "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15"]
