"""What a GGUF file's metadata say about the blocks: sizes, norms, rotations, windows, caps.

Six architectures, one block: they differ in where they normalise, how they rotate, and which activation gates. What
llama.cpp computes where a key is missing is computed here too (its `load_arch_hparams`); kinds of rope scaling that
edgec does not run are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgec import limits
from edgec.errors import CheckpointError, UnsupportedModelError
from edgec.gguf_header import GgufHeader
from edgec.runtime.ggml.library import ROPE_HALVES, ROPE_NORMAL

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
"""Mistral's files call themselves llama."""

_DEEP = {"gemma2": 46, "gemma3": 62}
"""Block counts of the 27 B models, whose attention is scaled by the width per head."""
_PERIOD = {"gemma2": 2, "gemma3": 6}
"""Of so many blocks, the last looks at everything and the others through a window."""


@dataclass(frozen=True)
class Config:
    """A decoder. width: of the residual stream; ffn: of the gated layer; vocab: rows of the table.

    window: positions that a local block sees (0: no block is local), one in `period` blocks is global. attention_cap,
    final_cap: soft caps c·tanh(x/c), 0 for none. rope: `ROPE_NORMAL` or `ROPE_HALVES`.
    """

    architecture: str
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    context: int
    epsilon: float
    rope: int
    rope_base: float
    rope_base_local: float
    rope_scale: float
    rope_scale_local: float
    attention_scale: float
    attention_cap: float = 0.0
    final_cap: float = 0.0
    window: int = 0
    period: int = 1

    @property
    def gemma(self) -> bool:
        """Scales the embedding by √width, gates with GELU, scales the queries before they meet the keys."""
        return self.architecture.startswith("gemma")

    @property
    def normed_heads(self) -> bool:
        """Are queries and keys normalised, head by head?"""
        return self.architecture in ("qwen3", "gemma3")

    @property
    def post_norms(self) -> bool:
        """Is what attention and feed-forward give normalised before it is added?"""
        return self.architecture in ("gemma2", "gemma3")

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head

    def local(self, layer: int) -> bool:
        """Does this block see only a window?"""
        return self.window > 0 and layer % self.period < self.period - 1


_MOST_HEADS = 64
"""Times that queries or keys may be as wide as the network; 4 is the most that a model is known to have."""


def read_config(header: GgufHeader, vocab: int, rope: int | None = None) -> Config:
    """From metadata. vocab: rows of the table; rope: given by factored files, whose queries keep transformers' order.

    Raises UnsupportedModelError or CheckpointError.
    """
    name = header.architecture
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(f"{header.path}: architecture {name!r}; edgec.runtime.ggml runs {ARCHITECTURES}")
    if header.integer(f"{name}.expert_count", 0):
        raise UnsupportedModelError(f"{header.path}: a mixture of experts; edgec.runtime.ggml runs dense blocks")
    layers = header.integer(f"{name}.block_count", low=1, high=limits.MAX_LAYERS)
    width = header.integer(f"{name}.embedding_length", low=1)
    heads = header.integer(f"{name}.attention.head_count", low=1)
    head = header.integer(f"{name}.attention.key_length", width // heads, low=2, high=1024)
    kv_heads = header.integer(f"{name}.attention.head_count_kv", heads, low=1)
    if heads > width or max(heads, kv_heads) * head > _MOST_HEADS * width:
        raise CheckpointError(f"{header.path}: {heads} and {kv_heads} heads of {head} in a width of {width}")
    if heads % kv_heads or head % 2:
        raise UnsupportedModelError(f"{header.path}: {heads} heads of {head} over {kv_heads} key heads")
    for key, expected in (("attention.value_length", head), ("rope.dimension_count", head)):
        if header.integer(f"{name}.{key}", expected) != expected:
            raise UnsupportedModelError(f"{header.path}: {name}.{key} differs from the head size {head}")
    scale = _rope_scale(header, name)
    base = header.number(f"{name}.rope.freq_base", 10000.0)
    epsilon = header.number(f"{name}.attention.layer_norm_rms_epsilon")
    if not (0 <= epsilon < 1 and base > 0):
        raise CheckpointError(f"{header.path}: a norm's epsilon of {epsilon:g}, rotation with base {base:g}")
    gemma3 = name == "gemma3"
    period = header.integer(
        f"{name}.attention.sliding_window_pattern", _PERIOD.get(name, 1), low=1, high=limits.MAX_LAYERS
    )
    window = header.integer(f"{name}.attention.sliding_window", 4096 if name == "gemma2" else 0)
    return Config(
        architecture=name,
        layers=layers,
        width=width,
        ffn=header.integer(f"{name}.feed_forward_length", low=1),
        heads=heads,
        kv_heads=kv_heads,
        head=head,
        vocab=vocab,
        context=header.integer(f"{name}.context_length", low=1, high=1 << 30),
        epsilon=epsilon,
        rope=(ROPE_NORMAL if name == "llama" else ROPE_HALVES) if rope is None else rope,
        rope_base=base,
        rope_base_local=header.number(f"{name}.rope.freq_base_swa", 10000.0 if gemma3 else base),
        rope_scale=scale,
        rope_scale_local=1.0 if gemma3 else scale,
        attention_scale=_attention_scale(name, layers, width, heads, head),
        attention_cap=header.number(f"{name}.attn_logit_softcapping", 50.0) if name == "gemma2" else 0.0,
        final_cap=_final_cap(header, name),
        window=window if name in _PERIOD else 0,
        period=period,
    )


def _rope_scale(header: GgufHeader, name: str) -> float:
    kind = header.text(f"{name}.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise UnsupportedModelError(f"{header.path}: rope scaling {kind!r}; edgec.runtime.ggml runs linear and llama3")
    factor = header.number(f"{name}.rope.scaling.factor", header.number(f"{name}.rope.scale_linear", 0.0))
    if factor < 0:
        raise CheckpointError(f"{header.path}: rotary scaling by {factor:g}")
    return 1.0 / factor if factor and kind == "linear" else 1.0


def _attention_scale(name: str, layers: int, width: int, heads: int, head: int) -> float:
    return 1 / math.sqrt(width // heads if layers == _DEEP.get(name) else head)


def _final_cap(header: GgufHeader, name: str) -> float:
    """Gemma 2 has one even where its file does not say so."""
    return header.number(f"{name}.final_logit_softcapping", 30.0 if name == "gemma2" else 0.0)
