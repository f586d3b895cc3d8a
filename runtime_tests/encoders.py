"""all-MiniLM-L6-v2 at two budgets, and with packed products, beside its dense forms, with one thread and with two:
`python -m runtime_tests.encoders`. Quality is on edgec's default text; onnxruntime's int8 is made from edgec's own
dense graph.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from runtime_tests.models import minilm_folder

_ARTIFACTS = {
    "minilm-default": [],
    "minilm-19.5MB": ["--budget", "19.5MB"],
    "minilm-packed": ["--arithmetic", "packed"],
}
_BASELINES = ("fp32", "int8", "int4")


def _edgec(work: Path, *arguments: str) -> None:
    """Run it in `work`, so that what it prints names no folder of this machine."""
    sys.stdout.write(f"$ edgec {' '.join(arguments)}\n".replace(str(minilm_folder()), "MODEL"))
    sys.stdout.flush()
    subprocess.run([sys.executable, "-m", "edgec", *arguments], check=True, cwd=work)


def main() -> int:
    model = str(minilm_folder())
    peers = [part for name in _BASELINES for part in ("--baseline", name)]
    with tempfile.TemporaryDirectory(prefix="edgec-encoders-") as folder:
        work = Path(folder)
        subprocess.run(
            [sys.executable, "-m", "edgec", "profile", model, "-o", "profile"],
            check=True,
            cwd=work,
            stdout=subprocess.DEVNULL,
        )
        for name, options in _ARTIFACTS.items():
            searched = ["--profile", "profile", "--search", "greedy:20s", "-o", name]
            _edgec(work, "export", model, "--target", "onnx-x64", *options, *searched)
        for threads in ("1", "2"):
            _edgec(work, "bench", *_ARTIFACTS, "--model", model, *peers, "--threads", threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
