"""An export that dies: what the processes of `test_interruptions` run. Apart, so that a fresh process can import it."""

from __future__ import annotations

import os
import signal

from edgec import pipeline


def export(request: pipeline.ExportRequest, last: str) -> None:
    """Exports; SIGKILL ends the process as soon as it reports the stage `last`."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == last:
            os.kill(os.getpid(), signal.SIGKILL)

    pipeline.export(request, progress)
