"""llama.cpp's own quantiser, called as `llama-quantize` does when it is given no importance matrix."""

from __future__ import annotations

import ctypes
from collections import Counter
from pathlib import Path

from edgec.errors import BenchError, RuntimeUnavailableError
from edgec.gguf_header import read_header
from edgec.runtime.llama_cpp import MODEL_FILE, import_llama_cpp
from edgec.runtime.options import physical_cores


def tool(kind: str) -> str:
    return f"llama.cpp's quantiser, {kind} (no importance matrix), from edgec's F16 GGUF"


def missing() -> str:
    """Why this baseline cannot be built here; "" when it can."""
    try:
        import_llama_cpp()
    except RuntimeUnavailableError as error:
        return str(error)
    return ""


def quantise(source: Path, out: Path, kind: str) -> None:
    """`llama-quantize source out kind`: two files. Its defaults: head and table get the types that it thinks best, rows
    that a type's block does not divide get the next one that does.
    """
    lib = import_llama_cpp()
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = physical_cores()
    status = lib.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    if status != 0 or not out.is_file():
        raise BenchError(f"llama.cpp could not quantise {source} to {kind} (status {status}); its log says why")


def build(source: Path, out: Path, kind: str) -> None:
    quantise(source / MODEL_FILE, out / MODEL_FILE, kind)


def notes(folder: Path) -> tuple[str, ...]:
    """What the file's weights really are: mixed types, and more bits than the name says."""
    numbers: Counter[str] = Counter()
    stored = 0
    for tensor in read_header(folder / MODEL_FILE).tensors.values():
        if len(tensor.shape) > 1:
            numbers[tensor.type_name] += tensor.elements
            stored += tensor.nbytes
    total = sum(numbers.values())
    shares = ", ".join(f"{100 * count / total:.0f} % {name}" for name, count in numbers.most_common())
    return (f"{8 * stored / total:.2f} bits per weight: {shares}",)
