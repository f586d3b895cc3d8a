"""config.json of a GGUF: the hyper-parameters that llama.cpp reads, in transformers' words.

What llama.cpp hard-wires and no key says (Gemma's scale of the queries, the pattern of sliding windows) is written
here as src/llama-model.cpp has it. A key that would change the model and that is not understood is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgec import limits
from edgec.errors import CheckpointError, UnsupportedModelError
from edgec.gguf_header import GgufHeader, tensor_bytes

TABLE = "token_embd.weight"
HEAD = "output.weight"
_ROPE_FREQS = "rope_freqs.weight"
_SCALING = {"type", "factor", "original_context_length", "finetuned", "yarn_beta_fast", "yarn_beta_slow"}


def config_of(header: GgufHeader) -> dict[str, Any]:
    """Raises UnsupportedModelError for another family or feature, CheckpointError for missing or absurd values."""
    if header.metadata.get("general.type", "model") != "model":
        raise UnsupportedModelError(f"{header.path}: not a model but {header.text('general.type')!r}")
    family = header.architecture
    if family not in _FAMILIES:
        raise UnsupportedModelError(
            f"{header.path}: architecture {family!r}; edgec reads GGUF files of {', '.join(_FAMILIES)}. "
            "Give the transformers folder it was made from"
        )
    if header.integer(f"{family}.expert_count", 0):
        raise UnsupportedModelError(f"{header.path}: a mixture of experts; edgec reads dense models")
    if TABLE not in header.tensors:
        raise CheckpointError(f"{header.path}: no tensor {TABLE!r}; a vocabulary alone is not a model")
    common = _common(header, family)
    return common | _FAMILIES[family](header, common)


def _common(header: GgufHeader, family: str) -> dict[str, Any]:
    heads = header.integer(f"{family}.attention.head_count", low=1)
    hidden = header.integer(f"{family}.embedding_length", low=1)
    head_dim = header.integer(f"{family}.attention.key_length", hidden // heads, low=1)
    if header.integer(f"{family}.attention.value_length", head_dim, low=1) != head_dim:
        raise UnsupportedModelError(f"{header.path}: keys and values of different sizes")
    if header.integer(f"{family}.rope.dimension_count", head_dim, low=1) != head_dim:
        raise UnsupportedModelError(f"{header.path}: positions rotate only a part of each head")
    vocabulary = header.tensors[TABLE].shape[0]
    if header.integer(f"{family}.vocab_size", vocabulary) != vocabulary:
        raise CheckpointError(
            f"{header.path}: {family}.vocab_size is {header.integer(f'{family}.vocab_size')}, {TABLE} has "
            f"{vocabulary} rows"
        )
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": header.integer(f"{family}.feed_forward_length", low=1),
        "num_hidden_layers": header.integer(f"{family}.block_count", low=1, high=limits.MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": header.integer(f"{family}.attention.head_count_kv", heads, low=1),
        "head_dim": head_dim,
        "max_position_embeddings": header.integer(f"{family}.context_length", low=1),
        "rms_norm_eps": header.number(f"{family}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(header, family, head_dim),
        "tie_word_embeddings": HEAD not in header.tensors,
        "bos_token_id": _token(header, "bos_token_id", vocabulary),
        "eos_token_id": _token(header, "eos_token_id", vocabulary),
        "pad_token_id": _token(header, "padding_token_id", vocabulary),
    }


def _token(header: GgufHeader, name: str, vocabulary: int) -> int | None:
    key = f"tokenizer.ggml.{name}"
    return header.integer(key, high=vocabulary - 1) if key in header.metadata else None


def _llama(header: GgufHeader, common: Mapping[str, Any]) -> dict[str, Any]:
    """Mistral too: llama.cpp knows no difference, and the file does not say which it was."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
    }


def _qwen2(header: GgufHeader, common: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu"}


def _qwen3(header: GgufHeader, common: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
    }


def _gemma(header: GgufHeader, common: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(header: GgufHeader, common: Mapping[str, Any]) -> dict[str, Any]:
    return _capped(header, common, "gemma2", largest=46, pattern=2) | {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": header.number("gemma2.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": header.number("gemma2.final_logit_softcapping", 30.0),
    }


def _gemma3(header: GgufHeader, common: Mapping[str, Any]) -> dict[str, Any]:
    local = header.number("gemma3.rope.freq_base_swa", 10_000.0)
    cap = "gemma3.final_logit_softcapping"
    return _capped(header, common, "gemma3", largest=62, pattern=6) | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": header.number(cap) if cap in header.metadata else None,
        "rope_parameters": {
            "full_attention": common["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _capped(
    header: GgufHeader, common: Mapping[str, Any], family: str, *, largest: int, pattern: int
) -> dict[str, Any]:
    """What Gemma 2 and 3 share. largest: the depth by which llama.cpp knows the 27B models, whose scale differs.
    pattern: every so many-th layer sees everything.
    """
    layers = common["num_hidden_layers"]
    stated = header.metadata.get(f"{family}.attention.sliding_window_pattern", pattern)
    types = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    same = np.array_equal(np.asarray(stated), [t != "full_attention" for t in types])
    if not same and not np.array_equal(np.asarray(stated), pattern):
        raise UnsupportedModelError(f"{header.path}: sliding windows in another pattern than every {pattern} layers")
    per_head = common["hidden_size"] / common["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": per_head if layers == largest else common["head_dim"],
        "sliding_window": header.integer(f"{family}.attention.sliding_window", low=1),
        "layer_types": types,
    }


def _rope(header: GgufHeader, family: str, head_dim: int) -> dict[str, Any]:
    theta = header.number(f"{family}.rope.freq_base", 10_000.0)
    prefix = f"{family}.rope.scaling."
    stated = {key.removeprefix(prefix) for key in header.metadata if key.startswith(prefix)}
    kind = header.text(prefix + "type", "linear" if prefix + "factor" in header.metadata else "none")
    if f"{family}.rope.scale_linear" in header.metadata or not stated <= _SCALING:
        unknown = sorted(stated - _SCALING) or ["rope.scale_linear"]
        raise UnsupportedModelError(f"{header.path}: rotary scaling with {unknown[0]!r}, which edgec does not read")
    if _ROPE_FREQS in header.tensors:
        return {"rope_theta": theta, **_llama3(header, head_dim, theta)}
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(f"{header.path}: rotary scaling {kind!r}; edgec reads linear, yarn and Llama 3's")
    found: dict[str, Any] = {"rope_type": kind, "rope_theta": theta, "factor": header.number(prefix + "factor")}
    if kind == "yarn":
        found["original_max_position_embeddings"] = header.integer(prefix + "original_context_length", low=1)
        for name in ("beta_fast", "beta_slow"):
            if f"{prefix}yarn_{name}" in header.metadata:
                found[name] = header.number(f"{prefix}yarn_{name}")
    return found


def _llama3(header: GgufHeader, head_dim: int, theta: float) -> dict[str, Any]:
    """The parameters that give the file's table of factors, found among those that Llama 3's checkpoints use.

    A GGUF stores the table [head_dim / 2] and not what made it; the only free number that differs among the published
    models is the factor, which is the table's largest entry.
    """
    info = header.tensors[_ROPE_FREQS]
    if info.type_name != "F32" or info.elements != head_dim // 2:
        raise CheckpointError(f"{header.path}: {_ROPE_FREQS} is {info.type_name} {list(info.shape)}")
    table = tensor_bytes(header, _ROPE_FREQS).view(np.float32).astype(np.float64)
    factor = float(table.max())
    for original in (8192, header.integer(f"{header.architecture}.context_length")):
        parameters = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        wave = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
        smooth = (original / wave - 1.0) / (4.0 - 1.0)
        middle = 1.0 / ((1 - smooth) / factor + smooth)
        expected = np.where(wave < original / 4.0, 1.0, np.where(wave > original, factor, middle))
        if np.allclose(table, expected, rtol=1e-4):
            return {"rope_type": "llama3", **parameters, "original_max_position_embeddings": original}
    raise UnsupportedModelError(f"{header.path}: {_ROPE_FREQS} holds other factors than Llama 3's rule gives")


_FAMILIES: Mapping[str, Callable[[GgufHeader, Mapping[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}
