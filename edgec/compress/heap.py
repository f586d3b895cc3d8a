"""The C library's heap, told to give memory of large arrays back to the system as soon as they are dropped.

glibc raises the size from which it does so (M_MMAP_THRESHOLD) up to 32 MB as such arrays come and go, and keeps what is
smaller in a heap that fragments: compressing block by block, a quarter of the peak was memory that nobody used, and it
grew with the number of blocks. A fixed threshold costs page faults, which drown in the fitting.
"""

from __future__ import annotations

import ctypes
import logging
import sys

logger = logging.getLogger(__name__)

_M_MMAP_THRESHOLD = -3
"""<malloc.h> of glibc; setting it ends its growing."""
_LARGE = 1 << 20


def return_large_arrays() -> bool:
    """From now on, and for the whole process. False where the C library is another one: then nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    done = bool(mallopt and mallopt(_M_MMAP_THRESHOLD, _LARGE))
    if not done:
        logger.debug("no mallopt here: the heap keeps what it was given")
    return done
