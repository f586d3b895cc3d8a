"""What the harness believes of a worker: finite numbers above zero, known events, no more samples than asked for."""

from __future__ import annotations

import json

import pytest

from edgec.bench.jobs import Answers, Job
from edgec.errors import BenchError

JOB = Job(folder="/f", task="causal-lm", threads=2, samples=2, sentences=("a", "b"))


def test_a_job_survives_the_wire() -> None:
    assert Job.from_json(JOB.to_json()) == JOB


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"nonsense", b'{"folder": 1, "extra": 2, "sentences": []}'])
def test_a_malformed_job_is_refused(data: bytes) -> None:
    with pytest.raises(BenchError, match="malformed"):
        Job.from_json(data)


def test_a_job_of_another_version_is_refused() -> None:
    with pytest.raises(BenchError, match="version"):
        Job.from_json(JOB.to_json().replace(b'"version": 1', b'"version": 99'))


def test_good_answers_are_collected() -> None:
    answers = Answers()
    for line in (
        b'{"event": "ready", "runtime_rss_bytes": 5e6, "versions": {"onnxruntime": "1.31"}}',
        b'{"event": "loaded", "load_s": 0.5, "load_peak_rss_bytes": 9000000}',
        b'{"event": "sample", "metrics": {"ttft_ms": 3.5}}',
        b'{"event": "done", "peak_rss_bytes": 10000000, "mapped_rss_bytes": 4096}',
    ):
        assert answers.take(line, JOB), answers.problem
    assert answers.done and answers.load_s == 0.5 and answers.samples == [{"ttft_ms": 3.5}]
    assert answers.facts == {"onnxruntime": "1.31"} and answers.peak_rss_bytes == 10_000_000
    assert answers.mapped_rss_bytes == 4096


@pytest.mark.parametrize(
    "line",
    [
        b"Segmentation fault",
        b"",
        b"[1]",
        b"[" * 200_000,
        b'{"event": "surprise"}',
        b'{"event": "sample", "metrics": {"ttft_ms": NaN}}',
        b'{"event": "sample", "metrics": {"ttft_ms": -1}}',
        b'{"event": "sample", "metrics": {"ttft_ms": 0}}',
        b'{"event": "sample", "metrics": {"ttft_ms": Infinity}}',
        b'{"event": "sample", "metrics": {"ttft_ms": 1e300}}',
        b'{"event": "sample", "metrics": {"ttft_ms": 1' + b"0" * 400 + b"}}",
        b'{"event": "loaded", "load_s": 1' + b"0" * 400 + b', "load_peak_rss_bytes": 1}',
        b'{"event": "ceilings", "values": {"run_s_int8": 1e-320}}',
        b'{"event": "sample", "metrics": {"ttft_ms": "3"}}',
        b'{"event": "sample", "metrics": {"ttft_ms": true}}',
        b'{"event": "sample", "metrics": {"made_up": 1}}',
        b'{"event": "sample", "metrics": {}}',
        b'{"event": "sample"}',
        b'{"event": "loaded", "load_s": -2, "load_peak_rss_bytes": 1}',
        b'{"event": "done"}',
        b"\xff\xfe",
    ],
)
def test_nonsense_ends_the_worker_with_a_reason(line: bytes) -> None:
    answers = Answers()
    assert not answers.take(line, JOB)
    assert answers.problem and len(answers.problem) < 500 and answers.problem.isprintable()


def test_endless_samples_are_refused() -> None:
    answers = Answers()
    line = json.dumps({"event": "sample", "metrics": {"ttft_ms": 1.0}}).encode()
    assert answers.take(line, JOB) and answers.take(line, JOB)
    assert not answers.take(line, JOB) and "more than the 2 samples" in answers.problem


def test_memory_of_two_prompts_is_taken_and_a_backward_pair_refused() -> None:
    event = {"event": "context", "short_tokens": 10, "short_rss_bytes": 5e6, "long_tokens": 40, "long_rss_bytes": 6e6}
    answers = Answers()
    assert answers.take(json.dumps(event).encode(), JOB)
    assert answers.context_rss == ((10, 5e6), (40, 6e6))
    assert not answers.take(json.dumps(event | {"long_tokens": 10}).encode(), JOB)
    assert "beside a short one" in answers.problem
