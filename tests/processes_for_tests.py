"""What became of another process."""

from __future__ import annotations

import time
from pathlib import Path


def ended(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process is gone, or goes within some seconds; one that nobody has waited for is. Reads /proc."""
    until = time.monotonic() + seconds
    while _alive(pid):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it may end between the opening and the reading
        return False
    return state != "Z"
