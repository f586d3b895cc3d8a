"""Scripts of figures run edgec as a reader of RESULTS.md would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def edgec(work: Path, *arguments: str, quiet: bool = False) -> None:
    """Print the command and run it in `work`, whose links give this machine's folders other names. quiet: without what
    it prints.
    """
    sys.stdout.write(f"$ edgec {' '.join(arguments)}\n")
    sys.stdout.flush()
    output = subprocess.DEVNULL if quiet else None
    subprocess.run([sys.executable, "-m", "edgec", *arguments], check=True, cwd=work, stdout=output)
