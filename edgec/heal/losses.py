"""What a student is taught: to agree with the dense model at every depth and at the end.

Encoders: relative squared error of the hidden states of every block (Jiao et al. 2020, TinyBERT, arXiv 1909.10351,
eq. 8), cosine of the pooled embeddings, and the similarities within the batch, which are what embeddings are used
for. Causal LMs: KL divergence of the next-token distributions (Hinton et al. 2015, arXiv 1503.02531, at temperature
1, where it is the quality that is reported), with the hidden states beside it at a small weight, which steadies the
first steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from edgec.evaluate.embeddings import pool
from edgec.pooling import Pooling

_COSINE, _SIMILARITY, _HIDDEN_LM = 4.0, 10.0, 0.02
"""Weights that bring the parts to one size on all-MiniLM-L6-v2 at 2.5 bits (parts 0.1, 0.03 and 0.003), and on a
small Llama.
"""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Seen:
    """One forward pass. hidden: output of the embeddings and of every block [B, T, d]; logits [B, T, V] of a causal
    LM.
    """

    hidden: Sequence[Tensor]
    logits: Tensor | None


def look(model: transformers.PreTrainedModel, batch: Batch) -> Seen:
    """Run a model and keep what the losses compare."""
    out: Any = model(**batch, output_hidden_states=True)
    return Seen(out.hidden_states, getattr(out, "logits", None))


def hidden_loss(student: Seen, teacher: Seen, mask: Tensor) -> Tensor:
    """Mean over the blocks of ‖s − t‖² ÷ ‖t − mean t‖² over unmasked tokens."""
    keep = mask.bool()
    parts = []
    for s, t in zip(student.hidden[1:], teacher.hidden[1:], strict=True):
        own, wanted = s[keep].float(), t[keep].float()
        parts.append((own - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum().clamp(min=1e-12))
    return torch.stack(parts).mean()


def distillation_loss(student: Seen, teacher: Seen, batch: Batch, pooling: Pooling | None) -> Tensor:
    """The whole loss of one batch; pooling is None for a causal LM."""
    mask = batch["attention_mask"]
    hidden = hidden_loss(student, teacher, mask)
    if pooling is None:
        assert student.logits is not None and teacher.logits is not None
        keep = mask.bool()
        log_p, log_q = teacher.logits[keep].float().log_softmax(-1), student.logits[keep].float().log_softmax(-1)
        divergence = functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        return divergence + _HIDDEN_LM * hidden
    own = functional.normalize(pool(student.hidden[-1].float(), mask, pooling), dim=-1)
    wanted = functional.normalize(pool(teacher.hidden[-1].float(), mask, pooling), dim=-1)
    cosine = (1 - (own * wanted).sum(-1)).mean()
    similarity = (own @ own.T - wanted @ wanted.T).square().mean()
    return hidden + _COSINE * cosine + _SIMILARITY * similarity
