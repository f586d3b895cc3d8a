"""Figures that can be compared: every contestant is resampled by the same draws, so that differences are paired.

The value of a contestant and of its thousand bootstrap replicates travel together as a `Resampled`; the interval of a
difference is then the quantiles of a difference of two vectors, whatever the figure is. Comparing two separate
intervals was turned down: sentences and windows differ far more from one another than two models do on one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgec.calibration import Batches
from edgec.evaluate.language import Logits

Array = NDArray[Any]

DRAWS = 1000
"""Bootstrap replicates [count]."""

_CHUNK_VALUES = 1 << 22
"""Numbers ranked at a time [count]."""

_KEEP_BYTES = 1 << 29
"""Largest table of dense log-probabilities that is kept between contestants [bytes]; beyond it they are recomputed."""


@dataclass(frozen=True, eq=False)
class Resampled:
    """value: the figure on all rows. draws: the same figure on each of DRAWS resamples of the rows, float64 [DRAWS]."""

    value: float
    draws: NDArray[np.float64]

    def __sub__(self, other: Resampled) -> Resampled:
        return Resampled(self.value - other.value, self.draws - other.draws)

    def interval(self) -> tuple[float, float]:
        """95 %; NaN where the figure is not finite on some resample."""
        low, high = np.quantile(self.draws, [0.025, 0.975])
        return float(low), float(high)

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.value) and np.isfinite(self.draws).all())


def resamples(rows: int, draws: int = DRAWS, seed: int = 0) -> NDArray[np.int64]:
    """Row numbers drawn with replacement [draws, rows]: one table for all contestants."""
    return np.random.default_rng(seed).integers(0, rows, (draws, rows))


def mean(totals: Array, counts: Array, table: NDArray[np.int64]) -> Resampled:
    """Σ totals ÷ Σ counts; totals, counts [rows]."""
    with np.errstate(invalid="ignore"):
        draws = totals[table].sum(1) / counts[table].sum(1)
    return Resampled(float(totals.sum() / counts.sum()), np.asarray(draws, np.float64))


def exponential(figure: Resampled) -> Resampled:
    """exp, replicate by replicate: from mean loss to perplexity."""
    with np.errstate(over="ignore"):
        return Resampled(float(np.exp(figure.value)), np.exp(figure.draws))


def spearman(similarities: Array, scores: Array, table: NDArray[np.int64]) -> Resampled:
    """Rank correlation of similarities and scores [rows]."""
    if not np.isfinite(similarities).all():
        return Resampled(float("nan"), np.full(len(table), np.nan))
    step = max(1, _CHUNK_VALUES // table.shape[1])
    tables = (table[i : i + step] for i in range(0, len(table), step))
    parts = [rank_correlation(similarities[t], scores[t]) for t in tables]
    return Resampled(float(rank_correlation(similarities[None], scores[None])[0]), np.concatenate(parts))


def rank_correlation(a: Array, b: Array) -> NDArray[np.float64]:
    """Spearman's, row by row: a, b [draws, rows] → [draws]; 0 where one of them is constant."""
    from scipy.stats import rankdata  # half a second of imports that most commands never need

    ra, rb = (rankdata(x, axis=1) for x in (a, b))
    ra, rb = ra - ra.mean(1, keepdims=True), rb - rb.mean(1, keepdims=True)
    scale = np.sqrt((ra**2).sum(1) * (rb**2).sum(1))
    return np.asarray(np.divide((ra * rb).sum(1), scale, out=np.zeros(len(a)), where=scale > 0), np.float64)


@dataclass(frozen=True, eq=False)
class WindowLosses:
    """Sums over each window, float64 [windows]. kl: KL(dense ‖ other) [nats]; nll: next-token loss [nats]; agree:
    tokens whose most likely successor is the same. tokens, predicted: what to divide by.
    """

    kl: NDArray[np.float64]
    nll: NDArray[np.float64]
    agree: NDArray[np.float64]
    tokens: NDArray[np.float64]
    predicted: NDArray[np.float64]


class LanguageReference:
    """The dense model over fixed windows; what it said is kept where it fits, so that each contestant runs alone."""

    def __init__(self, dense: Logits, batches: Batches) -> None:
        self._dense, self._batches = dense, batches
        self._kept: dict[int, torch.Tensor] = {}
        self._kept_bytes = 0

    def losses(self, other: Logits) -> WindowLosses:
        """A non-finite logit makes its window's sums NaN."""
        columns: list[list[torch.Tensor]] = [[], [], [], [], []]
        for number, batch in enumerate(self._batches.items):
            ids, mask = batch["input_ids"], batch["attention_mask"].bool()
            p = self._log_probabilities(number, ids)
            q = torch.from_numpy(other(ids.numpy())).log_softmax(-1)
            kl = ((p.exp() * (p - q)).sum(-1) * mask).sum(1)
            nll = -(q[:, :-1].gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(1)
            agree = ((p.argmax(-1) == q.argmax(-1)) & mask).sum(1)
            for column, part in zip(columns, (kl, nll, agree, mask.sum(1), mask[:, 1:].sum(1)), strict=True):
                column.append(part)
        return WindowLosses(*(torch.cat(column).double().numpy() for column in columns))

    def _log_probabilities(self, number: int, ids: torch.Tensor) -> torch.Tensor:
        if number in self._kept:
            return self._kept[number]
        found = torch.from_numpy(self._dense(ids.numpy())).log_softmax(-1)
        if self._kept_bytes + found.nbytes <= _KEEP_BYTES:
            self._kept[number] = found
            self._kept_bytes += found.nbytes
        return found
