"""Quality figures against brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from edgec.calibration import Batches, pad
from edgec.errors import CalibrationError, CheckpointError, UsageError
from edgec.evaluate.embeddings import (
    Pairs,
    cosine,
    embed_batch,
    pair_similarities,
    read_sts,
    spearman,
    spearman_loss_interval,
    torch_embedder,
)
from edgec.evaluate.language import compare, torch_logits
from edgec.pooling import Pooling

VOCABULARY = 7


class Hidden:
    """A "model" whose last hidden state is a table's rows."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.table = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).to(device)

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return type("Output", (), {"last_hidden_state": self.table[input_ids]})


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_ignores_padding(mode: str, normalize: bool) -> None:
    model: Any = Hidden()
    rows = [[1, 2, 3], [4, 5], [6]]
    found = embed_batch(model, pad(rows), Pooling(mode, normalize))
    for vector, row in zip(found, rows, strict=True):
        hidden = model.table[row]
        expected = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0)}[mode]
        torch.testing.assert_close(vector, expected / expected.norm() if normalize else expected)


def test_a_model_elsewhere_gets_its_inputs_there() -> None:
    """ "meta" stands for a GPU: what mixes the two fails, and nothing is computed."""
    model: Any = Hidden("meta")
    assert embed_batch(model, pad([[1, 2, 3], [4, 5]]), Pooling()).device.type == "meta"

    class Decoder:
        device = torch.device("meta")

        def __call__(self, input_ids: torch.Tensor) -> Any:
            assert input_ids.device.type == "meta"
            return type("Output", (), {"logits": torch.ones(1, 3, 4)})

    decoder: Any = Decoder()
    assert torch_logits(decoder)(np.array([[1, 2, 3]])).shape == (1, 3, 4)


def test_another_vocabulary_is_refused() -> None:
    batches = Batches("text", (pad([[1, 2, 3]]),))
    with pytest.raises(CheckpointError, match="logits of 9 tokens, where the dense model has 7: another vocabulary"):
        compare(lambda ids: np.zeros((*ids.shape, 7)), lambda ids: np.zeros((*ids.shape, 9)), batches)


def test_sentences_come_back_in_their_order() -> None:
    model: Any = Hidden()

    def tokenizer(texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
        return pad([[len(word) for word in text.split()] for text in texts])

    sentences = ["a bb ccc", "dddd", "a", "bb bb bb bb bb", "ccc a"]
    embed = torch_embedder(model, tokenizer, Pooling(), batch=2)
    alone = np.concatenate([embed([sentence]) for sentence in sentences])
    np.testing.assert_allclose(embed(sentences), alone, rtol=1e-6)


def test_cosine_of_known_vectors() -> None:
    a = np.array([[1.0, 0], [1, 1], [0, 0]])
    b = np.array([[0.0, 2], [-1, -1], [1, 0]])
    np.testing.assert_allclose(cosine(a, b), [0, -1, 0])


def test_pairs_embed_every_sentence_once() -> None:
    seen: list[str] = []

    def embed(sentences: Any) -> Any:
        seen.extend(sentences)
        return np.array([[len(s), 1.0] for s in sentences], np.float32)

    pairs = Pairs(("a", "bb", "a"), ("bb", "bb", "ccc"), (1.0, 2.0, 3.0))
    found = pair_similarities(embed, pairs)
    assert seen == ["a", "bb", "ccc"]
    np.testing.assert_allclose(found, cosine(np.array([[1, 1], [2, 1], [1, 1]]), np.array([[2, 1], [2, 1], [3, 1]])))


def test_a_spearman_loss_is_paired_and_its_interval_holds_it() -> None:
    generator = np.random.default_rng(0)
    truth = generator.random(300)
    dense = truth + 0.1 * generator.standard_normal(300)
    worse = dense + 0.3 * generator.standard_normal(300)
    loss, low, high = spearman_loss_interval(dense, worse, tuple(truth), draws=200)
    assert loss == pytest.approx(spearmanr(dense, truth).statistic - spearmanr(worse, truth).statistic)
    assert 0 < low < loss < high
    assert spearman_loss_interval(dense, worse, tuple(truth), draws=200) == (loss, low, high)
    same = spearman_loss_interval(dense, 3 * dense + 1, tuple(truth), draws=50)
    assert same == pytest.approx((0, 0, 0))
    assert spearman(dense, truth) > 0.9


def test_sts_files(tmp_path: Path) -> None:
    file = tmp_path / "sts.csv"
    file.write_text('x\ty\tz\t1\t4.5\tA "quoted" one.\tTwo.\n\nx\ty\tz\t2\t0\tThree.\tFour.\textra\n', encoding="utf-8")
    assert read_sts(file) == Pairs(('A "quoted" one.', "Three."), ("Two.", "Four."), (4.5, 0.0))
    same = "x\ty\tz\t1\t3\tA\tB\nx\ty\tz\t1\t3\tC\tD\n"  # no order to keep
    for broken in ("", same, "a\tb\n", "x\ty\tz\t1\tnan\tA\tB\nx\ty\tz\t1\t1\tA\tB\n", "x\ty\tz\t1\tbad\tA\tB\n"):
        file.write_text(broken, encoding="utf-8")
        with pytest.raises(UsageError, match="not an STS-Benchmark file"):
            read_sts(file)
    file.write_bytes(b"x\ty\tz\t1\t4.5\tcaf\xe9\tTwo.\n")
    with pytest.raises(CalibrationError, match=r"sts\.csv:1: not UTF-8"):
        read_sts(file)


def test_draws_of_few_pairs_have_an_interval() -> None:
    """Five pairs are often drawn as one, which has no order: its correlation counts as 0."""
    scores = (0.0, 1.0, 2.0, 3.0, 4.0)
    close, far = np.array([0.1, 0.2, 0.3, 0.4, 0.5]), np.array([0.1, 0.3, 0.2, 0.5, 0.4])
    loss, low, high = spearman_loss_interval(close, far, scores)
    assert np.isfinite([loss, low, high]).all() and low <= loss <= high
    assert spearman(np.ones(5), scores) == 0.0
    assert np.isnan(spearman(np.array([0.1, np.nan, 0.3, 0.4, 0.5]), scores))


def logits_of(seed: int, scale: float = 1.0) -> Any:
    table = scale * np.random.default_rng(seed).standard_normal((VOCABULARY, VOCABULARY)).astype(np.float32)
    return lambda ids: table[ids]


def test_language_quality_is_counted_per_unmasked_token() -> None:
    rows = [[1, 2, 3, 4, 5, 6], [3, 1], [2, 2, 2]]
    batches = Batches("x", (pad(rows[:2]), pad(rows[2:])))
    dense, other = logits_of(0), logits_of(1)
    found = compare(dense, other, batches)

    def softmax(z: Any) -> Any:
        return np.exp(z) / np.exp(z).sum(-1, keepdims=True)

    divergences, agree, nll, dense_nll = [], [], [], []
    for row in rows:
        p, q = softmax(dense(np.array(row)).astype(np.float64)), softmax(other(np.array(row)).astype(np.float64))
        divergences += list((p * np.log(p / q)).sum(-1))
        agree += list(p.argmax(-1) == q.argmax(-1))
        nll += [-np.log(q[i, row[i + 1]]) for i in range(len(row) - 1)]
        dense_nll += [-np.log(p[i, row[i + 1]]) for i in range(len(row) - 1)]
    assert found.tokens == 11
    assert found.kl == pytest.approx(np.mean(divergences), rel=1e-5)
    assert found.top1 == pytest.approx(np.mean(agree))
    assert found.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    assert found.dense_perplexity == pytest.approx(np.exp(np.mean(dense_nll)), rel=1e-5)
    assert found.low <= found.kl <= found.high


def test_a_model_agrees_with_itself() -> None:
    found = compare(logits_of(0), logits_of(0), Batches("x", (pad([[1, 2, 3]]),)))
    assert found.kl == pytest.approx(0, abs=1e-7)
    assert (found.top1, found.perplexity) == (1.0, found.dense_perplexity)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_model_passes_no_gate(bad: float) -> None:
    def broken(ids: Any) -> Any:
        logits = logits_of(1)(ids).copy()
        logits[0, 0, 0] = bad
        return logits

    found = compare(logits_of(0), broken, Batches("x", (pad([[1, 2, 3]]),)))
    assert not found.kl <= 1e9
