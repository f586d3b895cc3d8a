"""The cos/sin tables of rotary position embeddings, taken from the transformers model itself.

onnxruntime-genai's builder recomputes them from the config, family by family, and gets some wrong without a word
(Llama with linear or yarn scaling is exported as if it had none; Gemma 3's `rope_parameters` end in a KeyError). The
model's own rotary module cannot be wrong: whatever scaling it implements, a table of its outputs is what torch uses.
A table is constant as long as the frequencies do not depend on the length of the sequence, see `context_limit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

ROTARY_HEAD_DIM_FACTOR = 16
"""GroupQueryAttention rotates q and k itself only for a head_dim divisible by this [elements]; others get
RotaryEmbedding nodes.
"""

_CHUNK = 8192  # positions per call: the module makes about six arrays of [chunk, head_dim]


def rope_parameters(config: Any) -> Mapping[str, Mapping[str, Any]]:
    """Layer type → rope parameters; the single key is "" where all layers share them (every family but Gemma 3)."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if parameters and all(isinstance(value, Mapping) for value in parameters.values()):
        return parameters
    return {"": parameters}


def context_limit(config: Any) -> int:
    """The longest sequence that one table is right for [positions].

    longrope switches to other frequencies, for all positions at once, beyond `original_max_position_embeddings`, so two
    tables of a 128 k model would ship (100 MB for Phi-3-mini) to serve lengths whose KV cache no phone can hold.
    Every other scaling, dynamic NTK included, is constant up to `max_position_embeddings`.
    """
    limit = int(config.max_position_embeddings)
    for parameters in rope_parameters(config).values():
        if parameters.get("rope_type") == "longrope":
            original: Any = parameters.get("original_max_position_embeddings")
            limit = min(limit, int(original or getattr(config, "original_max_position_embeddings", limit)))
    return limit


def rotary_table(module: torch.nn.Module, context: int, layer_type: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [context, rotary_dim / 2] fp32: the layout of GroupQueryAttention and RotaryEmbedding.

    The module returns [1, positions, rotary_dim] whose halves are equal (transformers' half-rotation layout).
    """
    arguments: dict[str, Any] = {"layer_type": layer_type} if layer_type else {}
    like = torch.zeros(1, dtype=torch.float32)
    cosines, sines = [], []
    with torch.no_grad():
        for start in range(0, context, _CHUNK):
            positions = torch.arange(start, min(start + _CHUNK, context))[None]
            cos, sin = module(like, positions, **arguments)
            half = cos.shape[-1] // 2
            cosines.append(cos[0, :, :half].contiguous())
            sines.append(sin[0, :, :half].contiguous())
    return torch.cat(cosines), torch.cat(sines)
