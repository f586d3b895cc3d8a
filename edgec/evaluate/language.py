"""Causal-LM quality per token of held-out text: KL from the dense model, perplexity ratio, top-1 agreement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from edgec.calibration import Batches
from edgec.errors import CheckpointError

Logits = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Token ids int64 [B, T] → logits float32 [B, T, V]."""


@dataclass(frozen=True)
class LanguageQuality:
    """kl: mean KL(dense ‖ other) [nats per token]; low, high: its bootstrap 95 % interval over windows.
    perplexity, dense_perplexity: exp of the mean next-token loss. top1: share of tokens with the same most likely
    successor.
    """

    kl: float
    low: float
    high: float
    perplexity: float
    dense_perplexity: float
    top1: float
    tokens: int

    @property
    def perplexity_ratio(self) -> float:
        """1 where the other model predicts as well as the dense one."""
        return self.perplexity / self.dense_perplexity


def torch_logits(model: transformers.PreTrainedModel) -> Logits:
    """Of a model on any device: it may be healing on a GPU."""

    def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.no_grad():
            found = model(input_ids=torch.from_numpy(ids).to(model.device)).logits
        out: NDArray[np.float32] = found.float().cpu().numpy()
        return out

    return logits


def compare(dense: Logits, other: Logits, batches: Batches, seed: int = 0) -> LanguageQuality:
    """Both models over the same windows. A non-finite logit anywhere makes the KL NaN, which every gate refuses.

    Raises CheckpointError for models of different vocabularies.
    """
    kls: list[float] = []
    sizes: list[int] = []
    nll = dense_nll = 0.0
    agree = predicted = 0
    for batch in batches.items:
        ids = batch["input_ids"]
        p = torch.from_numpy(dense(ids.numpy())).log_softmax(-1)
        q = torch.from_numpy(other(ids.numpy())).log_softmax(-1)
        if p.shape != q.shape:
            raise CheckpointError(
                f"logits of {q.shape[-1]} tokens, where the dense model has {p.shape[-1]}: another vocabulary cannot "
                "be compared token by token"
            )
        mask = batch["attention_mask"].bool()
        divergence = (p.exp() * (p - q)).sum(-1)
        same = p.argmax(-1) == q.argmax(-1)
        kls += [float(row[keep].sum()) for row, keep in zip(divergence, mask, strict=True)]
        sizes += [int(keep.sum()) for keep in mask]
        agree += int((same & mask).sum())
        target, valid = ids[:, 1:, None], mask[:, 1:]
        dense_nll -= float(p[:, :-1].gather(-1, target)[..., 0][valid].sum())
        nll -= float(q[:, :-1].gather(-1, target)[..., 0][valid].sum())
        predicted += int(valid.sum())
    totals, counts = np.array(kls), np.array(sizes)
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, len(totals), (1000, len(totals)))
    low, high = np.quantile(totals[rows].sum(1) / counts[rows].sum(1), [0.025, 0.975])
    with np.errstate(over="ignore"):  # a ruined model's perplexity is infinite, and no gate lets that pass
        perplexity = float(np.exp(nll / predicted))
    return LanguageQuality(
        kl=float(totals.sum() / counts.sum()),
        low=float(low),
        high=float(high),
        perplexity=perplexity,
        dense_perplexity=float(np.exp(dense_nll / predicted)),
        top1=agree / int(counts.sum()),
        tokens=int(counts.sum()),
    )
