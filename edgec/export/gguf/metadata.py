"""Hyper-parameters of a model under the keys that llama.cpp reads, and the refusal of what it would compute otherwise.

llama.cpp takes many things from the architecture's name alone (Gemma's attention scale, Qwen's biases). Wherever a
configuration says something else than llama.cpp would do, the export is refused or the context is cut to where both
agree; a file that loads and is subtly wrong is the worst outcome. Keys: the GGUF specification, and
`src/models/*.cpp` of llama.cpp.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec import modeling
from edgec.errors import UnsupportedModelError
from edgec.export.gguf.names import architecture

logger = logging.getLogger(__name__)

Value = bool | int | float | str | list[str] | list[int] | list[float]
"""What a metadata key may hold: uint32, float32, bool, string, or an array of one of int32, float32, string."""

ROPE_FREQS = "rope_freqs.weight"
"""Tensor that divides the rotary frequencies (Llama 3's scaling): float32 [head_dim / 2]."""

_ACTIVATIONS = {
    "gemma": ("gelu_pytorch_tanh", "gelu"),
    "gemma2": ("gelu_pytorch_tanh",),
    "gemma3": ("gelu_pytorch_tanh",),
}


def hyperparameters(config: Any, name: str) -> dict[str, Value]:
    """Metadata of a model, keys in the order in which they are written. Raises UnsupportedModelError.

    config: its transformers configuration (`edgec.modeling.hf_config`). name: what the file calls the model.
    """
    arch = architecture(config.model_type)
    _refuse(config, arch)
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    values: dict[str, Value] = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": name,
        "general.quantization_version": 2,
        f"{arch}.block_count": int(config.num_hidden_layers),
        f"{arch}.context_length": _context(config, arch),
        f"{arch}.embedding_length": int(config.hidden_size),
        f"{arch}.feed_forward_length": int(config.intermediate_size),
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": int(getattr(config, "num_key_value_heads", None) or heads),
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.dimension_count": head_dim,
        f"{arch}.vocab_size": int(config.vocab_size),
        **_rope(config, arch),
    }
    if arch in ("gemma2", "gemma3"):
        values.update(_windows(config, arch))
    if arch == "gemma2":
        # Where a cap is missing, or 0, llama.cpp takes the usual one; a very large one does nothing.
        values[f"{arch}.attn_logit_softcapping"] = float(config.attn_logit_softcapping or 1e30)
    if arch == "gemma2" or (arch == "gemma3" and config.final_logit_softcapping):
        values[f"{arch}.final_logit_softcapping"] = float(config.final_logit_softcapping or 1e30)
    return values


def rotary_scaling(config: Any) -> str:
    """The kind of rotary scaling of full attention, as transformers names it: "default", "linear", "yarn", …"""
    return str(_rope_parameters(config)["full_attention"].get("rope_type", "default"))


def rope_divisors(config: Any) -> NDArray[np.float32] | None:
    """Llama 3's rotary scaling as llama.cpp takes it, a divisor per frequency [head_dim / 2]; None without it.

    The bands are those of transformers' `_compute_llama3_parameters`.
    """
    if rotary_scaling(config) != "llama3":
        return None
    rope = _rope_parameters(config)["full_attention"]
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    frequencies = float(rope["rope_theta"]) ** -(np.arange(0, head_dim, 2) / head_dim)
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = float(rope["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - blend) / factor + blend), np.float32)


def norm_offset(arch: str) -> float:
    """What is added to every norm's weight in the file: Gemma stores them as offsets from 1, llama.cpp does not."""
    return 1.0 if arch.startswith("gemma") else 0.0


def _rope_parameters(config: Any) -> dict[str, dict[str, Any]]:
    """By attention kind; "full_attention" is always there."""
    found = dict(config.rope_parameters or {})
    return found if "full_attention" in found else {"full_attention": found}


def _rope(config: Any, arch: str) -> dict[str, Value]:
    kinds = _rope_parameters(config)
    rope = kinds["full_attention"]
    values: dict[str, Value] = {f"{arch}.rope.freq_base": float(rope["rope_theta"])}
    local = kinds.get("sliding_attention") or {}
    if local:
        if local.get("rope_type", "default") != "default":
            raise UnsupportedModelError(
                f"rotary scaling {local['rope_type']!r} inside a window is unknown to llama.cpp"
            )
        values[f"{arch}.rope.freq_base_swa"] = float(local["rope_theta"])
    kind = rotary_scaling(config)
    if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModelError("partial_rotary_factor other than 1: llama.cpp rotates whole heads here")
    if kind in ("default", "llama3"):
        if kind == "llama3" and arch != "llama":
            raise UnsupportedModelError(f"llama.cpp does not read llama3 rotary scaling in {arch!r}")
        return values
    prefix = f"{arch}.rope.scaling"
    if kind == "linear":
        return {**values, f"{prefix}.type": "linear", f"{prefix}.factor": float(rope["factor"])}
    if kind == "yarn":
        _refuse_odd_yarn(rope)
        return {
            **values,
            f"{prefix}.type": "yarn",
            f"{prefix}.factor": float(rope["factor"]),
            f"{prefix}.original_context_length": int(
                rope.get("original_max_position_embeddings") or config.max_position_embeddings
            ),
            f"{prefix}.yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
            f"{prefix}.yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
        }
    raise UnsupportedModelError(f"rotary scaling {kind!r}: edgec writes default, linear, llama3 and yarn to GGUF")


def _refuse_odd_yarn(rope: dict[str, Any]) -> None:
    """llama.cpp derives the attention factor from the scaling factor, and always rounds its bounds."""
    odd = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key) is not None]
    if rope.get("truncate") is False:
        odd.append("truncate")
    if odd:
        raise UnsupportedModelError(f"yarn with {', '.join(odd)}: llama.cpp computes these in its own way")


def _windows(config: Any, arch: str) -> dict[str, Value]:
    """The sliding window, and which layers have it: in llama.cpp every 2nd (Gemma 2) or 6th (Gemma 3) layer has none,
    unless the file says another period.
    """
    own = 2 if arch == "gemma2" else 6
    kinds = list(config.layer_types)
    window = int(config.sliding_window or config.max_position_embeddings)
    values: dict[str, Value] = {f"{arch}.attention.sliding_window": window}
    for period in (own, *range(2, len(kinds) + 1)):
        if kinds == ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(len(kinds))]:
            return values if period == own else {**values, f"{arch}.attention.sliding_window_pattern": period}
    raise UnsupportedModelError(f"layer_types of {arch}: llama.cpp expects full attention in every n-th layer")


def _context(config: Any, arch: str) -> int:
    """Where llama.cpp has no sliding window (Mistral, Qwen), the context ends at the window: both agree up to it."""
    context = int(config.max_position_embeddings)
    window = modeling.sliding_window(config)
    if arch in ("gemma2", "gemma3") or not window or int(window) >= context:
        return context
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return context
    logger.warning("llama.cpp ignores the sliding window of %s; the file's context is cut to it: %d", arch, window)
    return int(window)


def _refuse(config: Any, arch: str) -> None:
    """What llama.cpp computes otherwise for this architecture. Raises UnsupportedModelError."""
    expected = _ACTIVATIONS.get(arch, ("silu",))
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in expected:
        raise UnsupportedModelError(f"activation {activation!r}: llama.cpp computes {expected[0]} in {arch}")
    if arch in ("gemma2", "gemma3"):
        # 46 layers (Gemma 2 27B) and 62 (Gemma 3 27B) are scaled by the width per head
        wide = config.num_hidden_layers == (46 if arch == "gemma2" else 62)
        scale = config.hidden_size // config.num_attention_heads if wide else config.head_dim
        if config.query_pre_attn_scalar != scale:
            raise UnsupportedModelError(
                f"query_pre_attn_scalar {config.query_pre_attn_scalar}: llama.cpp takes {scale} for this shape"
            )
    if arch == "gemma3" and getattr(config, "attn_logit_softcapping", None):
        raise UnsupportedModelError("attn_logit_softcapping in Gemma 3: llama.cpp has none there")
    if arch == "gemma3" and getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError("use_bidirectional_attention: edgec exports causal models to GGUF")
    if arch.startswith("gemma") and getattr(config, "attention_bias", False):
        raise UnsupportedModelError(f"attention_bias: llama.cpp's {arch} has none")
    if arch in ("gemma", "gemma2") and not config.tie_word_embeddings:
        raise UnsupportedModelError(f"an untied head: llama.cpp's {arch} reads the embedding table as its head")
