"""An export that dies: what the processes of `test_interruptions` run. Apart, so that a fresh process can import it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from edgec import pipeline


def export(request: pipeline.ExportRequest, told: Path, last: str = "") -> None:
    """Exports, writing every stage that begins into `told`, a line each; SIGKILL ends it where stage `last` does."""
    seen: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in seen:
            seen.append(stage)
            told.write_text("\n".join(seen), encoding="utf-8")
        if stage == last:
            os.kill(os.getpid(), signal.SIGKILL)

    pipeline.export(request, progress)
