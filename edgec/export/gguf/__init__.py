"""GGUF files: what llama.cpp loads as it is, and what edgec's own ggml runtime reads beside it.

gguf-py writes the bytes and knows how llama.cpp names tensors; it is an optional extra, so it is imported when a file
is written and not before.
"""

from __future__ import annotations

from typing import Any

from edgec.errors import RuntimeUnavailableError


def import_gguf() -> Any:
    """The gguf module. Raises RuntimeUnavailableError saying how to get it."""
    try:
        import gguf
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"gguf cannot be imported ({error}); pip install 'edgec[gguf]' (it compiles llama.cpp for some minutes)"
        ) from error
    return gguf
