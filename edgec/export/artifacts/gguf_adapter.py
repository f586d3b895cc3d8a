"""model.gguf with low-bit backbones, and adapter.gguf with their low-rank corrections as a LoRA: stock llama.cpp.

llama.cpp adds B(Ax) to a matrix's product without merging, which is a `residual` layer exactly: A [r, in] is core2, B
[out, r] is core1. Ranks differ from tensor to tensor, and the file has one alpha; 0 means a scale of 1 for all of them
(`llama_adapter_lora_weight::get_scale`). Where no layer has a correction, there is no adapter.gguf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from pathlib import Path

from edgec.contraction import MatMul, Sum
from edgec.export.artifacts import Written, gguf
from edgec.export.gguf import stock
from edgec.export.gguf.metadata import Value
from edgec.export.gguf.names import row_order, take_rows
from edgec.export.gguf.writer import GgufTensor, tensor_of
from edgec.fit import Core, Factors
from edgec.quantize.formats import BACKBONE
from edgec.records import Target
from edgec.runtime.llama_cpp import ADAPTER_FILE, MODEL_FILE

PLUGIN = True
RECONSTRUCTS = True
PACKAGES = gguf.PACKAGES

# A stock file that may have an adapter beside it; gguf's parity takes it along.
refuse_unsupported = gguf.refuse_unsupported
prepare = gguf.prepare
write_companions = gguf.write_companions
parity = gguf.parity

_HEADER_BYTES = 512
"""Of adapter.gguf before its tensors, about [bytes]."""


def other_bytes(draft: stock.Draft, planned: Set[str]) -> int:
    return gguf.other_bytes(draft, planned) + _HEADER_BYTES + 2 * gguf.TENSOR_BYTES * len(planned)


def write(
    draft: stock.Draft,
    factors: Mapping[str, Factors],
    target: Target,
    out: Path,
    progress: Callable[[int, int], None],
) -> Written:
    (out / ADAPTER_FILE).unlink(missing_ok=True)  # of an earlier plan of the same export
    whole: dict[str, Core] = {}
    corrections: list[GgufTensor] = []
    for layer, fitted in factors.items():
        pair = _correction(fitted)
        whole[layer] = gguf.whole_core(fitted) if pair is None else fitted.cores[BACKBONE]
        if pair is not None:
            corrections += _tensors(draft, layer, *pair)
    files = [(MODEL_FILE, draft.metadata, stock.tensors(draft, whole))]
    if corrections:
        metadata: dict[str, Value] = {
            "general.architecture": draft.architecture,
            "general.type": "adapter",
            "adapter.type": "lora",
            "adapter.lora.alpha": 0.0,
        }
        files.append((ADAPTER_FILE, metadata, corrections))
    return gguf.written(out, files, progress)


def _correction(fitted: Factors) -> tuple[Core, Core] | None:
    """(A [r, in], B [out, r]) of a residual layer; None for any other."""
    match fitted.contraction.steps:
        case (Sum(((MatMul(backbone),), (MatMul(a), MatMul(b)))),) if backbone == BACKBONE:
            return fitted.cores[a], fitted.cores[b]
    return None


def _tensors(draft: stock.Draft, layer: str, a: Core, b: Core) -> list[GgufTensor]:
    parameter = f"{layer}.weight"
    name, order = draft.names.of(parameter), row_order(draft.config, parameter)
    rows = b if order is None else take_rows(b, order)
    return [tensor_of(f"{name}.lora_a", a), tensor_of(f"{name}.lora_b", rows)]
