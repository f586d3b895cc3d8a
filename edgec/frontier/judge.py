"""One judge for all contestants: the same text, the same pairs, the same bootstrap draws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import transformers
from numpy.typing import NDArray

from edgec import calibration
from edgec.calibration import Batches
from edgec.errors import UsageError
from edgec.evaluate import paired
from edgec.evaluate.embeddings import Pairs, cosine, embed_batches, pair_similarities, read_sts, torch_embedder
from edgec.evaluate.language import torch_logits
from edgec.evaluate.paired import LanguageReference, Resampled, WindowLosses
from edgec.fit import Factors
from edgec.workspace import Workspace

EVALUATION_TOKENS = 20_480
"""Tokens of held-out text that contestants are compared on [tokens]."""

_READ_TOKENS = 2_000_000
"""Most tokens of an evaluation file that rows are picked from [tokens]."""

_PER_BATCH = 16
"""Rows evaluated at a time [count]."""

Measured = tuple[dict[str, float], Resampled]
"""Figures for the table, and the metric (smaller is better) with its bootstrap replicates."""


class Judge:
    """metric: "sts_loss", "cosine_loss" or "kl". text: what is measured on. dense_figures: the dense model's own.

    Raises UsageError for a file that does not suit the model, CalibrationError for too little text.
    """

    def __init__(
        self, workspace: Workspace, *, sts: Path | None, eval_text: Path | None, tokens: int = EVALUATION_TOKENS
    ) -> None:
        self.workspace = workspace
        if sts is not None and workspace.pooling is None:
            raise UsageError(f"--sts measures sentence encoders; {workspace.folder} is a causal LM")
        self._pairs: Pairs | None = read_sts(sts) if sts else None
        if eval_text is None:
            self._batches = workspace.batches("validate", tokens)
        else:
            text = calibration.load_text(eval_text)
            whole = calibration.tokenize(
                text, workspace.tokenizer, workspace.task, _READ_TOKENS, context=workspace.context
            )
            self._batches = spread(whole, tokens)
        self.text = f"{self._batches.origin}, {self._batches.tokens} tokens"
        self.dense_figures: dict[str, float] = {}
        if workspace.pooling is None:
            self._prepare_language()
        else:
            self._prepare_embeddings(sts)

    def _prepare_language(self) -> None:
        self.metric = "kl"
        self._reference = LanguageReference(torch_logits(self.workspace.model), self._batches)
        dense = self._reference.losses(torch_logits(self.workspace.model))
        self._table = paired.resamples(len(dense.kl))
        self.dense_figures["perplexity"] = self._perplexity(dense).value

    def _prepare_embeddings(self, sts: Path | None) -> None:
        assert self.workspace.pooling is not None
        self.metric = "cosine_loss"
        self._dense_vectors = embed_batches(self.workspace.model, self._batches, self.workspace.pooling)
        self._table = paired.resamples(len(self._dense_vectors))
        if self._pairs is None or sts is None:
            return
        self.metric = "sts_loss"
        self.text = f"{sts.name}, {len(self._pairs.scores)} pairs; cosine on {self.text}"
        self._pair_table = paired.resamples(len(self._pairs.scores))
        self._dense_spearman = self._spearman(self.workspace.model, self._pairs)
        self.dense_figures["spearman"] = self._dense_spearman.value

    def measure(
        self, factors: Mapping[str, Factors], vectors: Mapping[str, NDArray[np.float32]] = MappingProxyType({})
    ) -> Measured:
        """The model with the factors' matrices in place of its dense weights, and `vectors` for biases and norms."""
        with self.workspace.substituted(factors, vectors) as model:
            return self._language(model) if self.workspace.pooling is None else self._embeddings(model)

    def _language(self, model: transformers.PreTrainedModel) -> Measured:
        found = self._reference.losses(torch_logits(model))
        kl, perplexity = paired.mean(found.kl, found.tokens, self._table), self._perplexity(found)
        figures = _with_interval("kl", kl) | _with_interval("perplexity", perplexity)
        figures["perplexity_ratio"] = perplexity.value / self.dense_figures["perplexity"]
        figures["top1"] = float(found.agree.sum() / found.tokens.sum())
        return figures, kl

    def _perplexity(self, found: WindowLosses) -> Resampled:
        return paired.exponential(paired.mean(found.nll, found.predicted, self._table))

    def _embeddings(self, model: transformers.PreTrainedModel) -> Measured:
        assert self.workspace.pooling is not None
        distances = 1.0 - cosine(self._dense_vectors, embed_batches(model, self._batches, self.workspace.pooling))
        metric = paired.mean(distances, np.ones_like(distances), self._table)
        figures = {"cosine": 1.0 - metric.value, **_with_interval("cosine_loss", metric)}
        if self._pairs is not None:
            spearman = self._spearman(model, self._pairs)
            metric = self._dense_spearman - spearman
            figures = {"spearman": spearman.value, **_with_interval("sts_loss", metric), **figures}
        return figures, metric

    def _spearman(self, model: transformers.PreTrainedModel, pairs: Pairs) -> Resampled:
        assert self.workspace.pooling is not None
        embed = torch_embedder(
            model, self.workspace.tokenizer, self.workspace.pooling, max_tokens=self.workspace.context
        )
        return paired.spearman(pair_similarities(embed, pairs), np.asarray(pairs.scores), self._pair_table)


def spread(batches: Batches, tokens: int) -> Batches:
    """About `tokens` tokens of rows at even distances: the first pages of a file say little about the rest of it."""
    rows = [row[kept.bool()].tolist() for b in batches.items for row, kept in zip(*b.values(), strict=True)]
    wanted = max(1, round(len(rows) * tokens / max(1, batches.tokens)))
    if wanted >= len(rows):
        return batches
    picked = [rows[i * len(rows) // wanted] for i in range(wanted)]
    groups = [picked[i : i + _PER_BATCH] for i in range(0, wanted, _PER_BATCH)]
    return Batches(f"{wanted} of {len(rows)} windows of {batches.origin}", tuple(calibration.pad(g) for g in groups))


def _with_interval(name: str, figure: Resampled) -> dict[str, float]:
    low, high = figure.interval()
    return {name: figure.value, f"{name}_low": low, f"{name}_high": high}
