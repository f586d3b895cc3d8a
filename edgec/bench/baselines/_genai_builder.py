"""onnxruntime-genai's model builder, run the way its documentation says: as a script, with its own options."""

from __future__ import annotations

import runpy
import sys
import tempfile
from pathlib import Path

MODULE = "onnxruntime_genai.models.builder"

BLOCKS_OF_32 = {"block_size": 32, "accuracy_level": 4}
"""What every low-bit baseline asks for beside the precision."""


def build(source: Path, out: Path, precision: str, **options: str | int) -> None:
    """`python -m onnxruntime_genai.models.builder -i source -o out -p precision -e cpu --extra_options …`."""
    extra = [f"{key}={value}" for key, value in options.items()]
    with tempfile.TemporaryDirectory(prefix="edgec-builder-") as cache:
        arguments = ["-m", "local", "-i", str(source), "-o", str(out), "-p", precision, "-e", "cpu", "-c", cache]
        sys.argv = [MODULE, *arguments, *(["--extra_options", *extra] if extra else [])]
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
