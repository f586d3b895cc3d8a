"""all-MiniLM-L6-v2 at two budgets beside its dense forms, with one thread and with two: `python -m
runtime_tests.encoders`. Quality is on edgec's default text; onnxruntime's int8 is made from edgec's own dense graph.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from runtime_tests.models import minilm_folder

_BUDGETS = {"default": [], "19.5MB": ["--budget", "19.5MB"]}
_BASELINES = ("fp32", "int8", "int4", "torch-eager", "torch-compile")


def _edgec(*arguments: str) -> None:
    sys.stdout.write("$ edgec " + " ".join(Path(a).name if a.startswith("/") else a for a in arguments) + "\n")
    sys.stdout.flush()
    subprocess.run([sys.executable, "-m", "edgec", *arguments], check=True)


def main() -> int:
    model = str(minilm_folder())
    with tempfile.TemporaryDirectory(prefix="edgec-encoders-") as folder:
        artifacts = []
        for name, budget in _BUDGETS.items():
            artifacts.append(str(Path(folder) / f"minilm-{name}"))
            out = ["--search", "greedy:20s", "-o", artifacts[-1]]
            subprocess.run(
                [sys.executable, "-m", "edgec", "export", model, "--target", "onnx-x64", *budget, *out],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        peers = [part for name in _BASELINES for part in ("--baseline", name)]
        for threads in ("1", "2"):
            _edgec("bench", *artifacts, "--model", model, *peers, "--threads", threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
