"""Nothing is called exported before it was run: parity with torch, then quality of the very files that ship.

`accuracy_level=4` and int8 products quantise activations, about half a percent per matmul, which would hide a wiring
error. So structure is checked on a copy of the graph without it, sharing the same weights, against a tight
tolerance; what int8 activations cost is measured separately and is part of the quality figures.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir
import torch
import transformers
from numpy.typing import NDArray

from edgec.calibration import Batches
from edgec.errors import CheckpointError, VerificationError
from edgec.export.onnx.int8_products import use_float_activations
from edgec.export.onnx.saving import DATA_FILE, MODEL_FILE
from edgec.modeling import DECODER_TASK
from edgec.runtime.artifact import open_artifact
from edgec.runtime.interfaces import CAUSAL_LM, CausalLM
from edgec.runtime.options import RuntimeOptions, import_onnxruntime, session_options
from edgec.runtime.ort_decoder import OrtDecoder
from edgec.runtime.ort_encoder import OrtEncoder

Floats = NDArray[np.float32]

PARITY_TOLERANCE = 2e-3
"""Largest relative difference between the graph with float activations and torch on the same cores.

Measured: 1e-6 to 2e-4.
"""


@dataclass(frozen=True)
class Parity:
    """error: ‖graph − torch‖ ÷ ‖torch‖ over all outputs, activations in float.

    shipped: the same for the graph as it ships.
    """

    error: float
    shipped: float
    tolerance: float = PARITY_TOLERANCE


def verify_parity(folder: Path, reference: transformers.PreTrainedModel, task: str, batches: Batches) -> Parity:
    """Run the exported folder and the compressed torch model on the same tokens. Raises VerificationError."""
    inputs = probe(batches)
    expected = torch_outputs(reference, task, inputs)
    with float_activations(folder) as plain:
        error = relative(onnx_outputs(plain, task, inputs), expected)
    shipped = relative(onnx_outputs(folder, task, inputs), expected)
    if not error <= PARITY_TOLERANCE:
        raise disagreement("the exported graph", error, PARITY_TOLERANCE)
    return Parity(error, shipped)


def disagreement(what: str, error: float, tolerance: float) -> VerificationError:
    return VerificationError(
        f"verify: {what} differs from the compressed model by {error:.2e} (relative), at most {tolerance:.0e} is "
        "allowed; this is a fault of edgec or of the runtime, please report it with the model's config.json"
    )


def probe(batches: Batches) -> list[dict[str, torch.Tensor]]:
    """A few short batches: enough to exercise padding, small enough to be quick."""
    return [{name: tensor[:4, :64] for name, tensor in batch.items()} for batch in batches.items[:2]]


def torch_outputs(
    model: transformers.PreTrainedModel, task: str, inputs: list[dict[str, torch.Tensor]]
) -> list[Floats]:
    """Logits or last hidden states of every batch, padding rows zeroed: float32 [B, T, d]."""
    outputs = []
    with torch.no_grad():
        for batch in inputs:
            result = model(**batch)
            values = result.logits if task == DECODER_TASK else result.last_hidden_state
            outputs.append((values.float() * batch["attention_mask"].unsqueeze(-1)).numpy())
    return outputs


def onnx_outputs(folder: Path, task: str, inputs: list[dict[str, torch.Tensor]]) -> list[Floats]:
    """The same from an exported folder, through plain onnxruntime."""
    if task == DECODER_TASK:
        return decoder_outputs(OrtDecoder(folder), inputs)
    session = import_onnxruntime().InferenceSession(
        str(folder / MODEL_FILE), session_options(RuntimeOptions()), ["CPUExecutionProvider"]
    )
    wanted = {i.name for i in session.get_inputs()}
    outputs = []
    for batch in inputs:
        feeds = {name: tensor.numpy() for name, tensor in batch.items()}
        feeds["token_type_ids"] = np.zeros_like(feeds["input_ids"])
        values = session.run(["last_hidden_state"], {k: v for k, v in feeds.items() if k in wanted})[0]
        outputs.append(values * feeds["attention_mask"][:, :, None])
    return outputs


def decoder_of(folder: Path) -> CausalLM | OrtDecoder:
    """What gives the logits of every position: onnxruntime for its own graphs (genai prunes some heads), else the
    runtime that claims the folder.
    """
    if (folder / "genai_config.json").is_file():
        return OrtDecoder(folder)
    opened = open_artifact(folder)
    if opened.task != CAUSAL_LM:
        raise CheckpointError(f"{folder} holds a model for {opened.task}, expected a causal LM")
    return cast(CausalLM, opened)


def decoder_outputs(decoder: CausalLM | OrtDecoder, inputs: list[dict[str, torch.Tensor]]) -> list[Floats]:
    """Logits of every batch, padding rows zeroed: float32 [B, T, V]."""
    return [
        np.stack([_padded(decoder.logits(row[: int(mask.sum())].numpy()), len(row)) for row, mask in _rows(batch)])
        for batch in inputs
    ]


def stacked_logits(decoder: CausalLM | OrtDecoder, ids: NDArray[np.int64]) -> Floats:
    """Token ids [B, T] → logits [B, T, V], a row at a time."""
    return np.stack([decoder.logits(row) for row in ids])


def stacked_embeddings(encoder: OrtEncoder, batches: Batches) -> Floats:
    """Embeddings [N, d] of every row of token batches, in their order."""
    parts = []
    for batch in batches.items:
        tokens = {name: tensor.numpy() for name, tensor in batch.items()}
        tokens["token_type_ids"] = np.zeros_like(tokens["input_ids"])
        parts.append(encoder.forward(tokens))
    return np.concatenate(parts)


def _rows(batch: Mapping[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(batch["input_ids"], batch["attention_mask"], strict=True)


def _padded(values: Floats, length: int) -> Floats:
    padded = np.zeros((length, values.shape[1]), np.float32)
    padded[: len(values)] = values
    return padded


def relative(values: list[Floats], expected: list[Floats]) -> float:
    difference = sum(float(((v - e).astype(np.float64) ** 2).sum()) for v, e in zip(values, expected, strict=True))
    return float(np.sqrt(difference / sum(float((e.astype(np.float64) ** 2).sum()) for e in expected)))


@contextmanager
def float_activations(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` with the same graph at accuracy_level 0 and without int8 products; weights are
    linked, not copied.
    """
    model = ir.load(folder / MODEL_FILE)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    use_float_activations(model)
    with temporary_folder(folder) as temporary:
        ir.save(model, temporary / MODEL_FILE)
        if (folder / DATA_FILE).exists():
            os.link(folder / DATA_FILE, temporary / DATA_FILE)
        if (folder / "genai_config.json").exists():
            shutil.copyfile(folder / "genai_config.json", temporary / "genai_config.json")
        yield temporary


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, for copies of its files; it vanishes with the block."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name.lstrip('.')}.parity-", dir=folder.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
