"""Encoder quality: cosine to the dense embeddings, and Spearman of pair similarities."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from edgec.calibration import Batches, read_utf8
from edgec.errors import UsageError
from edgec.evaluate.paired import rank_correlation
from edgec.pooling import Pooling

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""Sentences [N] → embeddings float32 [N, d]."""


def embed_batch(model: transformers.PreTrainedModel, batch: dict[str, Tensor], pooling: Pooling) -> Tensor:
    """Sentence embeddings [B, d] of one token batch, on the model's device."""
    there = {name: tensor.to(model.device) for name, tensor in batch.items()}
    return pool(model(**there).last_hidden_state, there["attention_mask"], pooling)


def pool(hidden: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """Token states [B, T, d], mask [B, T] → sentence embeddings [B, d]."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    if pooling.mode == "cls":
        pooled = hidden[:, 0]
    elif pooling.mode == "max":
        pooled = hidden.masked_fill(mask == 0, -torch.inf).amax(dim=1)
    else:
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(pooled, dim=-1) if pooling.normalize else pooled


def embed_batches(model: transformers.PreTrainedModel, batches: Batches, pooling: Pooling) -> NDArray[np.float32]:
    """Embeddings [N, d] of every row of the batches, in their order."""
    with torch.no_grad():
        parts = [embed_batch(model, batch, pooling).float().cpu().numpy() for batch in batches.items]
    return np.concatenate(parts)


def torch_embedder(
    model: transformers.PreTrainedModel, tokenizer: Any, pooling: Pooling, *, max_tokens: int = 256, batch: int = 64
) -> Embed:
    """An `Embed` over a torch model; sentences are sorted by length to waste no padding, and come back in order."""

    def embed(sentences: Sequence[str]) -> NDArray[np.float32]:
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        result: NDArray[np.float32] | None = None
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            tokens = tokenizer(
                [sentences[i] for i in rows], padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
            )
            with torch.no_grad():
                vectors = embed_batch(model, dict(tokens), pooling).float().cpu().numpy()
            if result is None:
                result = np.empty((len(sentences), vectors.shape[1]), np.float32)
            result[rows] = vectors
        assert result is not None
        return result

    return embed


def cosine(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Row-wise cosine [N] of a, b [N, d]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.asarray((a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12))


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs with a human similarity score each [N]."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: tuple[float, ...]


def read_sts(file: Path) -> Pairs:
    """An STS-Benchmark file: tab-separated, score in column 5, sentences in 6 and 7 (1-based). Raises UsageError, and
    CalibrationError for what is no text.
    """
    try:
        lines = read_utf8(file).split("\n")
        rows = [row for row in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
        scores = tuple(float(row[4]) for row in rows)
        if not np.isfinite(scores).all() or len(set(scores)) < 2:
            raise ValueError("no pairs, or all of one score")
        return Pairs(tuple(row[5] for row in rows), tuple(row[6] for row in rows), scores)
    except (IndexError, ValueError, csv.Error) as error:
        raise UsageError(
            f"{file}: not an STS-Benchmark file (score in column 5, sentences in 6 and 7, tab-separated)"
        ) from error


def pair_similarities(embed: Embed, pairs: Pairs) -> NDArray[np.float64]:
    """Cosine of every pair's embeddings [N]."""
    sentences = list(dict.fromkeys(pairs.first + pairs.second))
    index = {s: i for i, s in enumerate(sentences)}
    vectors = embed(sentences)
    return cosine(vectors[[index[s] for s in pairs.first]], vectors[[index[s] for s in pairs.second]])


def spearman(similarities: NDArray[Any], scores: Sequence[float] | NDArray[Any]) -> float:
    """0 where either of the two is constant, NaN where either holds NaN."""
    if not (np.isfinite(similarities).all() and np.isfinite(scores).all()):
        return math.nan
    return float(rank_correlation(np.asarray(similarities)[None], np.asarray(scores)[None])[0])


def spearman_loss_interval(
    dense: NDArray[Any], other: NDArray[Any], scores: Sequence[float], draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Loss in Spearman (dense − other) with its paired-bootstrap 95 % interval: (loss, low, high)."""
    truth = np.asarray(scores)
    generator = np.random.default_rng(seed)
    losses = np.empty(draws)
    for i in range(draws):
        rows = generator.integers(0, len(truth), len(truth))
        losses[i] = spearman(dense[rows], truth[rows]) - spearman(other[rows], truth[rows])
    low, high = np.quantile(losses, [0.025, 0.975])
    return spearman(dense, truth) - spearman(other, truth), float(low), float(high)
