"""model.factored.gguf for edgec's ggml runtime: factored layers stay factored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from pathlib import Path

import transformers

from edgec.calibration import Batches
from edgec.checkpoint import Checkpoint
from edgec.errors import UnsupportedModelError
from edgec.export import verify
from edgec.export.artifacts import Written
from edgec.export.artifacts.gguf import metadata_bytes
from edgec.export.gguf import factored, import_gguf, stock
from edgec.export.gguf.floats import copy_in_floats
from edgec.fit import Factors
from edgec.records import Target
from edgec.runtime.ggml import MODEL_FILE
from edgec.runtime.ggml.library import library
from edgec.runtime.ggml.model import GgmlModel
from edgec.runtime.options import RuntimeOptions

PLUGIN = True
RECONSTRUCTS = False
PACKAGES = ("gguf", "llama-cpp-python")

SHIPPED_TOLERANCE = 0.15
"""Largest relative difference of the file as it ships: ggml rounds activations to 8 bits in every quantised product."""

_TENSOR_BYTES = 96
_PROGRAM_BYTES = 320
"""A factored layer's program in the metadata, about [bytes]."""


def refuse_unsupported(checkpoint: Checkpoint, task: str) -> None:
    stock.refuse_unsupported(checkpoint, task)
    rope = checkpoint.config.get("rope_parameters") or checkpoint.config.get("rope_scaling") or {}
    if "yarn" in str(rope):
        raise UnsupportedModelError(
            f"{checkpoint.folder}: YaRN rotary scaling, which edgec's ggml runtime does not compute; use --target gguf"
        )
    import_gguf()
    library()


def prepare(checkpoint: Checkpoint, task: str, work: Path) -> stock.Draft:
    return stock.draft(checkpoint)


def other_bytes(draft: stock.Draft, planned: Set[str]) -> int:
    metadata, tensors = factored.contents(draft, {})
    names = {draft.names.of(f"{layer}.weight") for layer in planned if layer not in draft.tied}
    rest = sum(tensor.nbytes for tensor in tensors if tensor.name not in names)
    return (
        rest
        + metadata_bytes(replace(draft, metadata=metadata))
        + _TENSOR_BYTES * len(tensors)
        + _PROGRAM_BYTES * len(planned)
    )


def write(
    draft: stock.Draft,
    factors: Mapping[str, Factors],
    target: Target,
    out: Path,
    progress: Callable[[int, int], None],
) -> Written:
    metadata, tensors = factored.contents(draft, factors)
    sizes = factored.write(out / MODEL_FILE, metadata, tensors, progress)
    return Written((out / MODEL_FILE).stat().st_size, sizes, {tensor.name: tensor.type for tensor in tensors})


def write_companions(checkpoint: Checkpoint, draft: stock.Draft, out: Path) -> int:
    """Nothing: tokenizer, chat template and hyper-parameters are inside the file."""
    return 0


def parity(
    folder: Path, reference: transformers.PreTrainedModel, task: str, batches: Batches, work: Path
) -> verify.Parity:
    """Wiring on a copy in which every number is F32, the cache too; then the file as it ships."""
    inputs = verify.probe(batches)
    expected = verify.torch_outputs(reference, task, inputs)
    plain = work / "plain.gguf"
    try:
        copy_in_floats(folder / MODEL_FILE, plain)
        exact = GgmlModel(plain, RuntimeOptions(), flash=False, cache="f32", selftest=False)
        error = verify.relative(verify.decoder_outputs(exact, inputs), expected)
    finally:
        plain.unlink(missing_ok=True)
    shipped = verify.relative(verify.decoder_outputs(GgmlModel(folder), inputs), expected)
    if not error <= verify.PARITY_TOLERANCE:
        raise verify.disagreement("the exported file", error, verify.PARITY_TOLERANCE)
    if not shipped <= SHIPPED_TOLERANCE:
        raise verify.disagreement("the exported file, activations in 8 bits,", shipped, SHIPPED_TOLERANCE)
    return verify.Parity(error, shipped)
