"""all-MiniLM-L6-v2 at two budgets, and with packed products, beside its dense forms, with one thread and with two:
`python -m runtime_tests.encoders`. Quality is on edgec's default text; onnxruntime's int8 is made from edgec's own
dense graph.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from runtime_tests.commands import edgec
from runtime_tests.models import minilm_folder

_ARTIFACTS = {
    "minilm-default": [],
    "minilm-19.5MB": ["--budget", "19.5MB"],
    "minilm-packed": ["--arithmetic", "packed"],
}
_BASELINES = ("fp32", "int8", "int4")


def main() -> int:
    peers = [part for name in _BASELINES for part in ("--baseline", name)]
    with tempfile.TemporaryDirectory(prefix="edgec-encoders-") as folder:
        work = Path(folder)
        (work / "MODEL").symlink_to(minilm_folder().resolve())
        edgec(work, "profile", "MODEL", "-o", "profile", quiet=True)
        for name, options in _ARTIFACTS.items():
            searched = ["--profile", "profile", "--search", "greedy:20s", "-o", name]
            edgec(work, "export", "MODEL", "--target", "onnx-x64", *options, *searched)
        for threads in ("1", "2"):
            edgec(work, "bench", *_ARTIFACTS, "--model", "MODEL", *peers, "--threads", threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
