"""A small Llama of Python source (`pycode-lm` among the assets) exported for both runtimes: by default, with a cap on
milliseconds, and in the plain format of the fastest baselines, beside its dense forms: `python -m
runtime_tests.decoders`. Quality is on text that calibrated nothing.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from runtime_tests.commands import edgec
from runtime_tests.frontier import pycode_lm

_ARTIFACTS = {
    "llama-onnx": ["--target", "onnx-x64"],
    "llama-onnx-0.4ms": ["--target", "onnx-x64", "--max-latency", "0.4ms"],
    "llama-onnx-int4-b32": ["--target", "onnx-x64", "--plan", "dense:int4-b32"],
    "llama-gguf": ["--target", "gguf"],
    "llama-gguf-int4-b32": ["--target", "gguf", "--plan", "dense:int4-b32"],
}
_BASELINES = ("int4", "int4-pruned", "q8_0", "q4_0", "q4_k_m")


def main() -> int:
    peers = [part for name in _BASELINES for part in ("--baseline", name)]
    with tempfile.TemporaryDirectory(prefix="edgec-decoders-") as folder:
        work = Path(folder)
        request = pycode_lm(work)
        assert request.calibration is not None
        (work / "MODEL").symlink_to(request.model.resolve())
        text = ["--calibration", request.calibration.name]
        targets = ["--target", "onnx-x64", "--target", "gguf"]
        edgec(work, "profile", "MODEL", *text, *targets, "-o", "profile", quiet=True)
        for name, options in _ARTIFACTS.items():
            settings = ["--profile", "profile", "--search", "greedy:10s", "--heal", "off"]
            edgec(work, "export", "MODEL", *options, *text, *settings, "-o", name, quiet=True)
        edgec(work, "bench", *_ARTIFACTS, "--model", "MODEL", *text, *peers, "--threads", "2")
    return 0


if __name__ == "__main__":
    sys.exit(main())
