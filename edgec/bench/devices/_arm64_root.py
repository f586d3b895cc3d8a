"""The folder in which arm64's Python, numpy and onnxruntime run under qemu-user on another kind of processor.

Layout: `emulator` (qemu-aarch64, static), `sysroot/` (an arm64 Debian's Python and C library), `site/` (wheels). It is
made from package indexes by `python -m runtime_tests.arm64` in a clone of the repository: a command of edgec never
uses the network, so the device takes a finished folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from edgec.errors import BenchError

CORTEX_A76 = "cortex-a76"
"""Emulated CPU model: dot products and half floats, no int8 matrix multiply; 2018's phones and today's boards."""

NEWEST = "max"
"""Everything that the emulator knows (int8 matrix multiply, SVE, …): the kernels of newer phones and servers."""

CPUS = (CORTEX_A76, NEWEST)


def python_command(root: Path, cpu: str) -> list[str]:
    """Arguments that start the arm64 Python on one emulated CPU model. Raises BenchError where `root` is no such
    folder.
    """
    pythons = [p for p in (root / "sysroot/usr/bin").glob("python3.*") if re.fullmatch(r"python3\.\d+", p.name)]
    if len(pythons) != 1:
        raise BenchError(f"{root}: expected one python3.N in the arm64 root, found {len(pythons)}")
    return [str(root / "emulator"), "-cpu", cpu, "-L", str(root / "sysroot"), str(pythons[0])]


def python_environment(root: Path, threads: int = 1, code: str = "") -> dict[str, str]:
    """The whole environment of the emulated Python: nothing of the caller's leaks in. code: a folder to import from."""
    return {
        "PYTHONHOME": str(root / "sysroot" / "usr"),
        "PYTHONPATH": os.pathsep.join(part for part in (code, str(root / "site")) if part),
        "PYTHONNOUSERSITE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
    }
