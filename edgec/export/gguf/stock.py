"""A whole model as the tensors and metadata of one GGUF file that any llama.cpp runs.

Matrices that a plan chose come as they were quantised; whatever is factored is multiplied out first by the caller.
Norms and biases are F32, as llama.cpp wants them. A head that shares its table is left out of the file, which is how
llama.cpp ties them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec import calibration, modeling
from edgec.checkpoint import Checkpoint, read_json
from edgec.errors import CheckpointError, PlanError, UnsupportedModelError
from edgec.export.gguf.metadata import ROPE_FREQS, Value, hyperparameters, norm_offset, rope_divisors
from edgec.export.gguf.names import Names, row_order, take_rows
from edgec.export.gguf.vocab import no_vocabulary, vocabulary
from edgec.export.gguf.writer import GgufTensor, tensor_of
from edgec.fit import Core
from edgec.modeling import DECODER_TASK

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_MAX_NAME = 200


@dataclass(frozen=True)
class Draft:
    """A checkpoint on its way into a GGUF file.

    places: tensor of the checkpoint → the model's own parameter name. tied: head → the table that it shares.
    """

    checkpoint: Checkpoint
    config: Any
    names: Names
    metadata: Mapping[str, Value]
    places: Mapping[str, str]
    tied: Mapping[str, str]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])


def refuse_unsupported(checkpoint: Checkpoint, task: str) -> None:
    """Raises UnsupportedModelError for what llama.cpp, or edgec's writer for it, cannot take."""
    if task != DECODER_TASK:
        raise UnsupportedModelError(f"edgec writes causal LMs to GGUF, and this model does {task}; use an ONNX target")
    hyperparameters(modeling.hf_config(checkpoint), "")


def draft(checkpoint: Checkpoint) -> Draft:
    """Everything about the file but its planned matrices. Raises UnsupportedModelError, CheckpointError."""
    config = modeling.hf_config(checkpoint)
    model = modeling.without_memory(checkpoint)
    tied = {layer.name: layer.tied_to for layer in modeling.layers(model) if layer.tied_to}
    metadata = {**hyperparameters(config, _name(checkpoint)), **_vocabulary(checkpoint, config)}
    names = Names(config.model_type, config.num_hidden_layers)
    return Draft(checkpoint, config, names, metadata, modeling.places(model, checkpoint), tied)


def tensors(draft: Draft, cores: Mapping[str, Core]) -> list[GgufTensor]:
    """Every tensor of the file, in the order of the model's parameters.

    cores: layer → the whole matrix that ships for it, in the checkpoint's order of rows. Raises PlanError where a head
    and its table differ and llama.cpp reads only one of them.
    """
    found = []
    heads = set(draft.tied)
    for layer, core in cores.items():
        if layer in heads:
            table = cores.get(draft.tied[layer])
            if table is core:
                continue
            if draft.architecture in ("gemma", "gemma2"):
                raise PlanError(
                    f"llama.cpp's {draft.architecture} reads one table as embedding and head; give {layer!r} "
                    f"and {draft.tied[layer]!r} the same form"
                )
        parameter = f"{layer}.weight"
        order = row_order(draft.config, parameter)
        found.append(tensor_of(draft.names.of(parameter), core if order is None else take_rows(core, order)))
    replaced = {f"{layer}.weight" for layer in cores}
    for name, place in draft.places.items():
        if place not in replaced and place.removesuffix(".weight") not in heads:
            found.append(_plain(draft, name, place))
    divisors = rope_divisors(draft.config)
    if divisors is not None:
        found.append(tensor_of(ROPE_FREQS, divisors))
    return sorted(found, key=lambda tensor: _position(tensor.name))


def _plain(draft: Draft, name: str, place: str) -> GgufTensor:
    """A tensor that no plan replaced: vectors as F32, matrices (of a partial plan) as F16."""
    info = draft.checkpoint.tensors[name]
    order = row_order(draft.config, place)
    offset = norm_offset(draft.architecture) if place.endswith("norm.weight") else 0.0
    dtype: Any = np.float32 if len(info.shape) == 1 else np.float16

    def data() -> NDArray[Any]:
        values = np.asarray(draft.checkpoint.read(name), np.float32) + np.float32(offset)
        return np.ascontiguousarray(values if order is None else values[order], dtype)

    return GgufTensor(draft.names.of(place), info.shape, "F32" if dtype is np.float32 else "F16", data)


def _position(name: str) -> tuple[int, int, str]:
    """Table, blocks in order, what comes after: the order in which a runtime reads the file."""
    parts = name.split(".")
    if parts[0] == "blk":
        return 1, int(parts[1]), name
    return (0 if parts[0] in ("token_embd", "rope_freqs") else 2), 0, name


def _name(checkpoint: Checkpoint) -> str:
    """What the checkpoint calls itself; a folder's name would make equal inputs give unequal files."""
    told = PurePath(str(checkpoint.config.get("_name_or_path") or "")).name
    return (told or checkpoint.model_type)[:_MAX_NAME]


def _vocabulary(checkpoint: Checkpoint, config: Any) -> dict[str, Value]:
    if not any((checkpoint.folder / name).is_file() for name in _TOKENIZER_FILES):
        return no_vocabulary()
    tokenizer = calibration.load_tokenizer(checkpoint)
    return vocabulary(tokenizer, int(config.vocab_size), _ends(checkpoint, config))


def _ends(checkpoint: Checkpoint, config: Any) -> list[int]:
    """Tokens that end a text, by the generation config, else by the model's."""
    path = checkpoint.folder / "generation_config.json"
    told: Any = read_json(path) if path.is_file() else {}
    ends = (told.get("eos_token_id") if isinstance(told, dict) else None) or getattr(config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int for end in listed):
        raise CheckpointError(f"{path}: eos_token_id is {json.dumps(ends)[:80]}, expected a token id or a list of them")
    return listed
