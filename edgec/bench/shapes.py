"""Models with a real shape and random weights, for speed: no hub is needed, and nothing about quality may be claimed.

Tensors are made and written shard by shard, so that the peak memory is the largest tensor (the embedding), not the
model. The tokenizer is byte-level with a small vocabulary: a runtime has to load one, but no text has a meaning here.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.errors import UsageError
from edgec.outputs import staged_folder

_STD = 0.02
_SHARD_BYTES = 256 * 1024 * 1024
_ROWS_AT_ONCE = 1 << 12
_SPECIALS = ("<s>", "</s>")
_LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder's dimensions. The head is tied to the embedding, as in the small real ones."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int
    rope_theta: float = 10000.0
    llama3_rope: bool = False

    def config(self) -> dict[str, Any]:
        """config.json, in the keys that the real models use."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "dtype": "float16",
            "eos_token_id": 1,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": _STD,
            "intermediate_size": self.ffn,
            "max_position_embeddings": self.positions,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": dict(_LLAMA3_ROPE) if self.llama3_rope else None,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": self.vocab,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape, in the order in which they are written."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for i in range(self.layers):
            prefix = f"model.layers.{i}."
            yield prefix + "input_layernorm.weight", (self.hidden,)
            yield prefix + "self_attn.q_proj.weight", (query, self.hidden)
            yield prefix + "self_attn.k_proj.weight", (key, self.hidden)
            yield prefix + "self_attn.v_proj.weight", (key, self.hidden)
            yield prefix + "self_attn.o_proj.weight", (self.hidden, query)
            yield prefix + "post_attention_layernorm.weight", (self.hidden,)
            yield prefix + "mlp.gate_proj.weight", (self.ffn, self.hidden)
            yield prefix + "mlp.up_proj.weight", (self.ffn, self.hidden)
            yield prefix + "mlp.down_proj.weight", (self.hidden, self.ffn)
        yield "model.norm.weight", (self.hidden,)

    def parameters(self) -> int:
        """Distinct parameters (the tied table once)."""
        return sum(int(np.prod(shape)) for _, shape in self.tensors())


SHAPES: dict[str, Shape] = {
    s.name: s
    for s in (
        Shape("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128256, 131072, 500000.0, llama3_rope=True),
        Shape("llama-300m", 24, 1024, 2816, 16, 8, 64, 32000, 4096),
        Shape("llama-tiny", 2, 128, 384, 4, 2, 32, 640, 512),
    )
}


def get(name: str) -> Shape:
    """The shape called `name`. Raises UsageError that lists the known ones."""
    if name not in SHAPES:
        raise UsageError(f"unknown shape {name!r}; known: {', '.join(sorted(SHAPES))}")
    return SHAPES[name]


def write(shape: Shape | str, folder: Path, *, seed: int = 0, shard_bytes: int = _SHARD_BYTES) -> Path:
    """Writes a transformers folder of fp16 weights N(0, 0.02²) (norms 1), which appears whole or not at all.

    The same seed gives the same bytes: each tensor has its own generator, seeded by (seed, its name).
    Raises OutputError.
    """
    shape = get(shape) if isinstance(shape, str) else shape
    with staged_folder(folder) as stage:
        _write_weights(shape, stage, seed, shard_bytes)
        _write_tokenizer(shape, stage)
        _write_json(stage / "config.json", shape.config())
        _write_json(stage / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False})
    return folder


def with_layers(shape: Shape, layers: int) -> Shape:
    """The same shape, shallower or deeper: for a quick look at a large one."""
    return replace(shape, name=f"{shape.name}-{layers}layers", layers=layers)


def narrow(shape: Shape) -> Shape:
    """A twin with as many layers, heads and KV heads whose rows are 256 wide wherever the shape's divide by 256: small
    enough to try on it what depends on nothing else.
    """

    def width(size: int) -> int:
        return 256 if size % 256 == 0 else size

    head_dim = max(2, width(shape.heads * shape.head_dim) // shape.heads)
    return replace(
        shape,
        name=f"{shape.name}-narrow",
        hidden=width(shape.hidden),
        ffn=width(shape.ffn),
        head_dim=head_dim,
        vocab=min(shape.vocab, 512),
    )


def _write_weights(shape: Shape, folder: Path, seed: int, shard_bytes: int) -> None:
    from safetensors.numpy import save_file

    shards = list(_shards(shape, shard_bytes))
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {name: _tensor(name, dims, seed) for name, dims in shard}
        total += sum(t.nbytes for t in tensors.values())
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        record = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        _write_json(folder / "model.safetensors.index.json", record)


def _shards(shape: Shape, shard_bytes: int) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Tensors grouped into files of at most `shard_bytes`, or one tensor where a single one is larger."""
    shard: list[tuple[str, tuple[int, ...]]] = []
    size = 0
    for name, dims in shape.tensors():
        needed = 2 * int(np.prod(dims))
        if shard and size + needed > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append((name, dims))
        size += needed
    yield shard


def _tensor(name: str, dims: tuple[int, ...], seed: int) -> NDArray[np.float16]:
    """One tensor [dims] fp16; made a few thousand rows at a time, so that no fp32 copy of it exists."""
    if len(dims) == 1:
        return np.ones(dims, dtype=np.float16)
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    result = np.empty(dims, dtype=np.float16)
    for start in range(0, dims[0], _ROWS_AT_ONCE):
        rows = result[start : start + _ROWS_AT_ONCE]
        rows[...] = generator.standard_normal(rows.shape, dtype=np.float32) * np.float32(_STD)
    return result


def _write_tokenizer(shape: Shape, folder: Path) -> None:
    """A byte-level BPE of the 256 bytes, two specials and a few merges (onnxruntime-genai refuses none at all)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate((*_SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("e", "r"), ("a", "n")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    if len(vocab) > shape.vocab:
        raise UsageError(f"a vocabulary of {shape.vocab} is too small; at least {len(vocab)} tokens are needed")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in _SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "model_max_length": shape.positions}
    _write_json(folder / "tokenizer_config.json", {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
