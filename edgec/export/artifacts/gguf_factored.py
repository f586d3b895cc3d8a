"""model.factored.gguf for edgec's ggml runtime: factored layers stay factored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from pathlib import Path

import transformers

from edgec import modeling
from edgec.calibration import Batches
from edgec.checkpoint import Checkpoint
from edgec.errors import UnsupportedModelError
from edgec.export import verify
from edgec.export.artifacts import Written, gguf
from edgec.export.gguf import factored, import_gguf, stock
from edgec.export.gguf.floats import copy_in_floats
from edgec.export.gguf.metadata import rotary_scaling
from edgec.fit import Factors
from edgec.records import Target
from edgec.runtime.ggml import MODEL_FILE
from edgec.runtime.ggml.library import library
from edgec.runtime.ggml.model import GgmlModel
from edgec.runtime.options import RuntimeOptions

PLUGIN = True
RECONSTRUCTS = False
PACKAGES = gguf.PACKAGES

prepare = gguf.prepare
write_companions = gguf.write_companions

_PROGRAM_BYTES = 320
"""A factored layer's program in the metadata, about [bytes]."""


def refuse_unsupported(checkpoint: Checkpoint, task: str) -> None:
    stock.refuse_unsupported(checkpoint, task)
    if rotary_scaling(modeling.hf_config(checkpoint)) == "yarn":
        raise UnsupportedModelError(
            f"{checkpoint.folder}: YaRN rotary scaling, which edgec's ggml runtime does not compute; use --target gguf"
        )
    import_gguf()
    library()


def other_bytes(draft: stock.Draft, planned: Set[str]) -> int:
    metadata, tensors = factored.contents(draft, {})
    names = {draft.names.of(f"{layer}.weight") for layer in planned if layer not in draft.tied}
    rest = sum(tensor.nbytes for tensor in tensors if tensor.name not in names)
    return (
        rest
        + gguf.metadata_bytes(replace(draft, metadata=metadata))
        + gguf.TENSOR_BYTES * len(tensors)
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
    return gguf.judged(error, shipped)
