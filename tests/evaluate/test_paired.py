"""Paired figures: the values of the plain ones, and differences that know they are paired."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from edgec.calibration import Batches
from edgec.evaluate import paired
from edgec.evaluate.language import compare
from edgec.evaluate.paired import LanguageReference, Resampled

VOCABULARY = 13


def _model(noise: float) -> Callable[[NDArray[np.int64]], NDArray[np.float32]]:
    table = np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY))
    table = table + noise * np.random.default_rng(1).standard_normal(table.shape)
    return lambda ids: np.asarray(table[ids], np.float32)


def _batches() -> Batches:
    generator = torch.Generator().manual_seed(0)
    items = []
    for rows, width in ((5, 9), (3, 16)):
        mask = torch.ones(rows, width, dtype=torch.int64)
        mask[0, width // 2 :] = 0
        items.append(
            {
                "input_ids": torch.randint(0, VOCABULARY, (rows, width), generator=generator),
                "attention_mask": mask,
            }
        )
    return Batches("random", tuple(items))


def test_language_figures_are_those_of_compare() -> None:
    batches, dense, other = _batches(), _model(0), _model(0.4)
    plain = compare(dense, other, batches)
    found = LanguageReference(dense, batches).losses(other)
    table = paired.resamples(len(found.kl))
    kl = paired.mean(found.kl, found.tokens, table)
    assert kl.value == pytest.approx(plain.kl, rel=1e-5)
    assert kl.interval() == pytest.approx((plain.low, plain.high), rel=1e-5)
    perplexity = paired.exponential(paired.mean(found.nll, found.predicted, table))
    assert perplexity.value == pytest.approx(plain.perplexity, rel=1e-5)
    assert found.agree.sum() / found.tokens.sum() == pytest.approx(plain.top1)
    assert found.tokens.sum() == plain.tokens


def test_the_dense_model_runs_once_where_its_answers_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    dense = _model(0)

    def counted(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        nonlocal calls
        calls += 1
        return dense(ids)

    batches = _batches()
    reference = LanguageReference(counted, batches)
    first = reference.losses(_model(0.1))
    reference.losses(_model(0.2))
    assert calls == len(batches.items)
    monkeypatch.setattr(paired, "_KEEP_BYTES", 0)
    reference = LanguageReference(counted, batches)
    np.testing.assert_array_equal(reference.losses(_model(0.1)).kl, first.kl)
    reference.losses(_model(0.2))
    assert calls == 3 * len(batches.items)


def test_a_difference_is_paired() -> None:
    """Rows differ wildly, contestants by a constant: apart the intervals overlap, paired the difference is exact."""
    random = np.random.default_rng(0)
    totals, counts = random.exponential(10.0, 50), np.ones(50)
    table = paired.resamples(50)
    a, b = paired.mean(totals, counts, table), paired.mean(totals + 0.1, counts, table)
    assert a.interval()[1] > b.interval()[0]
    assert (a - b).interval() == pytest.approx((-0.1, -0.1))
    assert (a - a).interval() == (0, 0)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(100):
        totals = np.random.default_rng(seed).standard_normal(60)
        low, high = paired.mean(totals, np.ones(60), paired.resamples(60, draws=400)).interval()
        covered += low <= 0 <= high
    assert 87 <= covered <= 99


def test_spearman_is_scipys_on_all_rows_and_on_each_resample() -> None:
    random = np.random.default_rng(0)
    scores = random.integers(0, 6, 80).astype(float)  # ties, as in STS
    similarities = scores + 2 * random.standard_normal(80)
    table = paired.resamples(80, draws=20)
    found = paired.spearman(similarities, scores, table)
    assert found.value == pytest.approx(float(spearmanr(similarities, scores).statistic))
    expected = [float(spearmanr(similarities[rows], scores[rows]).statistic) for rows in table]
    assert found.draws == pytest.approx(np.array(expected))
    assert paired.spearman(np.ones(80), scores, table).value == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_known(value: float) -> None:
    rows: Any = np.array([1.0, value, 2.0, 3.0])
    table = paired.resamples(4, draws=50)
    assert not paired.spearman(rows, np.arange(4.0), table).finite
    assert not paired.mean(rows, np.ones(4), table).finite
    assert paired.mean(np.arange(4.0), np.ones(4), table).finite
    assert not paired.exponential(Resampled(1e4, np.full(3, 1e4))).finite
