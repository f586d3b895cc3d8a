"""The C library's heap, asked to give back what nobody uses any more."""

from __future__ import annotations

import ctypes
import sys


def return_unused() -> bool:
    """Give free memory back to the system, as glibc does not do by itself. False where the C library is another one.

    A session leaves much behind that it needed only while it was made: an encoder whose weights it unpacked, 70 of 150
    MB on MiniLM.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return bool(trim and trim(0))
