"""Memory of dropped arrays below glibc's highest threshold is the system's again."""

from __future__ import annotations

import sys

import pytest

from edgec.subprocesses import run

_PROGRAM = """
import numpy as np
from edgec.compress.heap import return_large_arrays

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if not return_large_arrays():
    raise SystemExit(77)
np.ones(30 << 20, np.uint8)  # would raise the threshold
start = resident()
kept = []
for _ in range(8):
    large = np.ones(24 << 20, np.uint8)
    kept.append(np.ones(1 << 18, np.uint8))  # on top of the heap: what lies below could not be given back
    del large
print(resident() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_dropped_arrays_leave_the_process() -> None:
    finished = run([sys.executable, "-c", _PROGRAM], timeout_s=60)
    if finished.returncode == 77:
        pytest.skip("this C library has no mallopt")
    assert finished.ok, finished.reason()
    assert int(finished.stdout) < 12 << 20
