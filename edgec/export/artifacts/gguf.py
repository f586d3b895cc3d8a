"""model.gguf for any llama.cpp: dense matrices, each in the ggml type that the plan chose.

Factored layers are multiplied out, since llama.cpp runs none; the planner is offered whole matrices only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Set
from pathlib import Path

import numpy as np
import transformers

from edgec.calibration import Batches
from edgec.checkpoint import Checkpoint
from edgec.errors import ExportError
from edgec.export import verify
from edgec.export.artifacts import Written
from edgec.export.gguf import import_gguf, stock
from edgec.export.gguf.blocks import ggml_type
from edgec.export.gguf.floats import copy_in_floats
from edgec.export.gguf.metadata import Value
from edgec.export.gguf.writer import GgufTensor, write_gguf
from edgec.fit import Core, Factors
from edgec.quantize.formats import storable
from edgec.records import Target
from edgec.runtime.llama_cpp import ADAPTER_FILE, MODEL_FILE, LlamaCpp, import_llama_cpp

logger = logging.getLogger(__name__)

PLUGIN = True
RECONSTRUCTS = True
PACKAGES = ("gguf", "llama-cpp-python")

SHIPPED_TOLERANCE = 0.15
"""Largest relative difference between the file as it ships and torch on the same numbers: ggml rounds activations to 8
bits in every product with a quantised matrix. Measured: 0.001 to 0.03; a wiring error gives 1.
"""

TENSOR_BYTES = 96
"""A tensor's entry in the header and its padding, about [bytes]."""


def refuse_unsupported(checkpoint: Checkpoint, task: str) -> None:
    stock.refuse_unsupported(checkpoint, task)
    import_gguf()
    import_llama_cpp()


def prepare(checkpoint: Checkpoint, task: str, work: Path) -> stock.Draft:
    return stock.draft(checkpoint)


def other_bytes(draft: stock.Draft, planned: Set[str]) -> int:
    plain = stock.tensors(draft, {})
    names = {draft.names.of(f"{layer}.weight") for layer in planned}
    rest = sum(tensor.nbytes for tensor in plain if tensor.name not in names)
    return rest + metadata_bytes(draft) + TENSOR_BYTES * (len(plain) + 2)


def metadata_bytes(draft: stock.Draft) -> int:
    """Of the file's metadata, nearly all of it vocabulary; exact but for a few bytes a key."""
    total = 24
    for key, value in draft.metadata.items():
        total += 8 + len(key) + 12
        if isinstance(value, str):
            total += 8 + len(value.encode())
        elif isinstance(value, list):
            total += sum(8 + len(v.encode()) if isinstance(v, str) else 4 for v in value)
    return total


def write(
    draft: stock.Draft,
    factors: Mapping[str, Factors],
    target: Target,
    out: Path,
    progress: Callable[[int, int], None],
) -> Written:
    tensors = stock.tensors(draft, {name: whole_core(fitted) for name, fitted in factors.items()})
    return written(out, [(MODEL_FILE, draft.metadata, tensors)], progress)


def written(
    out: Path, files: list[tuple[str, Mapping[str, Value], list[GgufTensor]]], progress: Callable[[int, int], None]
) -> Written:
    """Write GGUF files, (name, metadata, tensors) each, and say what is in them."""
    sizes: dict[str, int] = {}
    types: dict[str, str] = {}
    total = 0
    for name, metadata, tensors in files:
        sizes.update(write_gguf(out / name, metadata, tensors, progress))
        types.update({tensor.name: tensor.type for tensor in tensors})
        total += (out / name).stat().st_size
    return Written(total, sizes, types)


def whole_core(fitted: Factors) -> Core:
    """The matrix of a layer as it ships: the core itself where it is one, else multiplied out, as fp16."""
    if len(fitted.cores) == 1 and len(fitted.contraction.steps) == 1:
        core = next(iter(fitted.cores.values()))
        try:
            ggml_type(core)
            return core
        except ExportError as error:
            logger.warning("%s; written in floats", error)
    return np.ascontiguousarray(storable(fitted.dense()))


def write_companions(checkpoint: Checkpoint, draft: stock.Draft, out: Path) -> int:
    """Nothing: tokenizer, chat template and hyper-parameters are inside the file."""
    return 0


def parity(
    folder: Path, reference: transformers.PreTrainedModel, task: str, batches: Batches, work: Path
) -> verify.Parity:
    """Wiring on a copy of the file in F32, so that no activation is rounded; then the file as it ships."""
    inputs = verify.probe(batches)
    expected = verify.torch_outputs(reference, task, inputs)
    with verify.temporary_folder(folder) as plain:
        for name in (MODEL_FILE, ADAPTER_FILE):
            if (folder / name).is_file():
                copy_in_floats(folder / name, plain / name)
        error = verify.relative(verify.decoder_outputs(LlamaCpp(plain), inputs), expected)
    shipped = verify.relative(verify.decoder_outputs(LlamaCpp(folder), inputs), expected)
    return judged(error, shipped)


def judged(error: float, shipped: float) -> verify.Parity:
    """Both differences from torch within their tolerances. Raises VerificationError."""
    if not error <= verify.PARITY_TOLERANCE:
        raise verify.disagreement("the exported file", error, verify.PARITY_TOLERANCE)
    if not shipped <= SHIPPED_TOLERANCE:
        raise verify.disagreement("the exported file, activations in 8 bits,", shipped, SHIPPED_TOLERANCE)
    return verify.Parity(error, shipped)
