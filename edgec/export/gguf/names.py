"""Which architectures llama.cpp shares with transformers, and what each of their tensors is called there.

The table of tensor names is gguf-py's own (`TensorNameMap`); ours would go stale. Llama and Mistral are the odd ones:
llama.cpp rotates neighbouring pairs of a head's rows where transformers rotates its two halves, so the rows of their
query and key matrices change places in the file. Every row keeps its numbers, so a quantised matrix, or the core of a
factored one that makes the outputs, is permuted as it is: no number is rounded twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.contraction import MatMul, Step, Sum
from edgec.errors import ExportError, UnsupportedModelError
from edgec.export.gguf import import_gguf
from edgec.fit import Core, Factors
from edgec.quantize.formats import QuantizedTensor

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
"""transformers' model_type → `general.architecture`."""

_ROTATED = re.compile(r"\.self_attn\.(q|k)_proj(\.weight|\.bias)?$")

Rows = NDArray[np.int64]


def architecture(model_type: str) -> str:
    """llama.cpp's name of a transformers model type. Raises UnsupportedModelError listing the known ones."""
    if model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"edgec writes GGUF files of {', '.join(ARCHITECTURES)}; this model is {model_type!r}. Use an ONNX target"
        )
    return ARCHITECTURES[model_type]


class Names:
    """The names of one model's tensors."""

    def __init__(self, model_type: str, layers: int) -> None:
        gguf = import_gguf()
        name = architecture(model_type)
        number = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
        self._map = gguf.get_tensor_name_map(number, layers)

    def of(self, parameter: str) -> str:
        """`model.layers.0.self_attn.q_proj.weight` → `blk.0.attn_q.weight`. Raises UnsupportedModelError."""
        found = self._map.get_name(key=parameter, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedModelError(f"llama.cpp has no place for the tensor {parameter!r} in this architecture")
        return str(found)


def row_order(config: Any, name: str) -> Rows | None:
    """The order of a layer's output rows in the file, W_file = W[order]; None where they stay in place.

    config: the transformers configuration. name: of a layer or of its weight or bias.
    """
    match = _ROTATED.search(name)
    if match is None or ARCHITECTURES.get(config.model_type) != "llama":
        return None
    query = config.num_attention_heads
    heads = query if match[1] == "q" else getattr(config, "num_key_value_heads", None) or query
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // query
    halves = np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2)
    return halves.transpose(0, 2, 1).reshape(-1)


def permute_outputs(factors: Factors, order: Rows) -> Factors:
    """The same factors with their outputs in another order: the rows of every core that makes outputs change places.

    Raises ExportError where no single core makes the outputs (tensor trains with several output modes).
    """
    made = _output_cores(factors.contraction.steps, factors.contraction.out_features)
    uses = _matmuls(factors.contraction.steps)
    cores: dict[str, Core] = dict(factors.cores)
    for name in made:
        if sum(step.core == name for step in uses) != 1:
            raise ExportError(f"core {name!r} is used twice, so its rows cannot change places")
        cores[name] = take_rows(cores[name], order)
    return Factors(factors.contraction, cores)


def take_rows(core: Core, order: Rows) -> Core:
    """A core [n, …] with its rows in another order, stored numbers unchanged."""
    if not isinstance(core, QuantizedTensor):
        return np.ascontiguousarray(core[order])
    zero_points = None if core.zero_points is None else core.zero_points[order]
    return replace(core, codes=core.codes[order], scales=core.scales[order], zero_points=zero_points)


def _output_cores(steps: Sequence[Step], out: int) -> list[str]:
    match steps[-1]:
        case MatMul(core, n, _) if n == out:
            return [core]
        case Sum(branches):
            return [name for branch in branches for name in _output_cores(branch, out)]
    raise ExportError(
        f"{steps[-1]} makes the outputs of this layer, and only a matrix product's rows can change places"
    )


def _matmuls(steps: Sequence[Step]) -> list[MatMul]:
    found = []
    for step in steps:
        if isinstance(step, MatMul):
            found.append(step)
        elif isinstance(step, Sum):
            found += [inner for branch in step.branches for inner in _matmuls(branch)]
    return found
