"""Which causal LMs the ONNX decoder front end takes, decided from the config alone, before any work.

A family is listed only when its small model agrees with torch in `tests/export/onnx/test_decoder.py`. The builder knows
more architectures; what is not tested here is refused rather than exported on trust.
"""

from __future__ import annotations

from typing import Any

from edgec import limits, modeling
from edgec.errors import UnsupportedModelError

FAMILIES = {
    "Gemma2ForCausalLM": "Gemma2Model",
    "Gemma3ForCausalLM": "Gemma3Model",
    "GemmaForCausalLM": "GemmaModel",
    "LlamaForCausalLM": "LlamaModel",
    "MistralForCausalLM": "MistralModel",
    "Phi3ForCausalLM": "Phi3MiniModel",
    "Qwen2ForCausalLM": "QwenModel",
    "Qwen3ForCausalLM": "Qwen3Model",
    "SmolLM3ForCausalLM": "LlamaModel",  # SmolLM3Model rotates for head_dim 8 what it must not; NoPE is ours
}
"""Architecture in config.json → class in onnxruntime_genai.models.builders."""

HEAD_DIM_FACTOR = 8
"""GroupQueryAttention on the CPU refuses a head_dim that this does not divide [elements]."""

ACTIVATIONS = frozenset({"silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu"})
"""Activations that the builder writes and that a gated MLP of these families can name."""


def architecture(config: Any) -> str:
    """The one architecture that config.json names, such as "LlamaForCausalLM"."""
    names = list(getattr(config, "architectures", None) or [])
    if len(names) != 1:
        raise UnsupportedModelError(
            f"config.json names {len(names)} architectures ({', '.join(names) or 'none'}); expected exactly one of "
            + ", ".join(sorted(FAMILIES))
        )
    return str(names[0])


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def local_layers(config: Any) -> tuple[bool, ...]:
    """Per layer, whether it attends only to `sliding_window` positions, by the rules of the transformers models."""
    layers = int(config.num_hidden_layers)
    if modeling.sliding_window(config) is None:
        return (False,) * layers
    types = getattr(config, "layer_types", None)
    if types is None:  # Mistral and Phi-3: every layer, or none
        return (True,) * layers
    return tuple(kind == "sliding_attention" for kind in types[:layers])


def check_supported(config: Any) -> None:
    """Raise UnsupportedModelError, with the reason and what would work, if onnxruntime cannot execute the model.

    config: a transformers config (PretrainedConfig). Reads nothing else, so it costs nothing.
    """
    name = architecture(config)
    if name not in FAMILIES:
        raise UnsupportedModelError(
            f"{name} is not among the causal LMs that the ONNX targets can export: {', '.join(sorted(FAMILIES))}"
        )
    if getattr(config, "quantization_config", None):
        raise UnsupportedModelError(
            "the checkpoint is already quantised (config.json has quantization_config); give the unquantised one"
        )
    _check_dimensions(name, config)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{name} uses the activation {activation!r}; the ONNX targets have {', '.join(sorted(ACTIVATIONS))}"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModelError(f"{name} with use_bidirectional_attention is no causal LM: it has no KV cache")
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(sorted(unknown))}; only attention is exported"
        )


def _check_dimensions(name: str, config: Any) -> None:
    dimensions = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "max_position_embeddings")
    for key in dimensions:
        value = int(getattr(config, key))
        if not 0 < value <= limits.MAX_DIMENSION:
            raise UnsupportedModelError(f"{name}: {key} is {value}; expected 1 to {limits.MAX_DIMENSION}")
    if not 0 < int(config.num_hidden_layers) <= limits.MAX_LAYERS:
        raise UnsupportedModelError(
            f"{name}: num_hidden_layers is {config.num_hidden_layers}; expected 1 to {limits.MAX_LAYERS}"
        )
    size, heads = head_dim(config), int(config.num_attention_heads)
    if size % HEAD_DIM_FACTOR:
        lower = size - size % HEAD_DIM_FACTOR
        works = " or ".join(str(value) for value in (lower, lower + HEAD_DIM_FACTOR) if value)
        raise UnsupportedModelError(
            f"{name} has head_dim {size}, and onnxruntime's GroupQueryAttention runs only multiples of "
            f"{HEAD_DIM_FACTOR} ({works} would do; multiples of 16 are fastest); use a GGUF target: "
            "ggml's attention takes any even head_dim"
        )
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"{name} has {heads} attention heads and {kv_heads} key/value heads; "
            "the first must be a multiple of the second"
        )
    window = getattr(config, "sliding_window", None)
    if any(local_layers(config)) and int(window or 0) < 1:
        raise UnsupportedModelError(f"{name} has sliding_window {window}; expected a positive number of positions")
