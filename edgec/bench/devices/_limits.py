"""What `local` may be held to: fewer cores, less memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgec.errors import UsageError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*([KMG]I?B)", re.IGNORECASE)


@dataclass(frozen=True)
class HostLimits:
    """cores: physical cores that the worker may run on, 0 for all. ram_bytes: private memory, 0 for all."""

    cores: int = 0
    ram_bytes: int = 0


def parse_limits(argument: str) -> HostLimits:
    """`cores=2,ram=2GB`, or "". Raises UsageError."""
    found: dict[str, int] = {}
    for part in filter(None, argument.split(",")):
        key, _, value = part.partition("=")
        if key not in ("cores", "ram") or key in found:
            raise UsageError(f"device 'local:{argument}': expected cores=N and ram=SIZE, each once, got {part!r}")
        found[key] = parse_cores(value) if key == "cores" else parse_ram_limit(value)
    return HostLimits(found.get("cores", 0), found.get("ram", 0))


def parse_cores(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text):
        raise UsageError(f"cores {text!r}: expected a whole number from 1 to 9999")
    return int(text)


def parse_ram_limit(text: str) -> int:
    """2GB, 512MB, 1.5GiB → bytes. Raises UsageError."""
    match = _SIZE.fullmatch(text)
    size = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    if not size >= 1 << 20:
        raise UsageError(f"ram limit {text!r}: expected a size of at least 1 MiB, for example 512MB or 2GB")
    return int(size)
