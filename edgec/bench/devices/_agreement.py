"""Holds two machines' answers to the same input against each other, in the words of a row's notes."""

from __future__ import annotations

import base64
import binascii
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgec.bench.jobs import Job
from edgec.errors import BenchError
from edgec.runtime.interfaces import ENCODER, Floats
from edgec.subprocesses import run

_MAX_CHECK_BYTES = 64 * 1024 * 1024
_MOST_KINDS = 12
_LEAST_COSINE = 0.99
_MOST_DIVERGENCE = 0.05


@dataclass(frozen=True)
class Answer:
    """What `edgec.bench.check` said: values [rows, width] float32, and how many nodes of each operator ran."""

    machine: str
    values: Floats
    operators: Mapping[str, int]


def ask(python: Sequence[str], environment: Mapping[str, str], job: Job, timeout_s: float) -> Answer:
    """Runs `edgec.bench.check` by that interpreter. Raises BenchError for one that gives no answer."""
    with tempfile.TemporaryDirectory(prefix="edgec-check-") as room:  # ours: it may be stopped before it tidies up
        done = run(
            [*python, "-P", "-m", "edgec.bench.check"],
            stdin=replace(job, samples=1).to_json(),
            env={**environment, "TMPDIR": room},
            timeout_s=timeout_s,
            max_output_bytes=_MAX_CHECK_BYTES,
        )
    if not done.ok:
        raise BenchError(f"the comparison ended early: {done.reason()}")
    return read_answer(done.stdout)


def read_answer(line: bytes) -> Answer:
    """Raises BenchError for what is no answer, and with the worker's own words where it could not answer."""
    try:
        record = json.loads(line)
        if "error" in record:
            raise BenchError(str(record["error"])[:500])
        rows, width = (int(n) for n in record["shape"])
        data = base64.b64decode(record["values"], validate=True)
        if rows < 1 or width < 1 or len(data) != 4 * rows * width:
            raise BenchError(f"an answer of shape {rows} x {width} came with {len(data)} bytes")
        values = np.frombuffer(data, dtype="<f4").reshape(rows, width).astype(np.float32)
        operators = {str(name)[:64]: int(count) for name, count in record["operators"].items()}
        return Answer(str(record["machine"])[:40], values, operators)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, binascii.Error) as error:
        raise BenchError(f"the comparison's answer is malformed: {error}") from error


def compared(here: Answer, there: Answer, task: str) -> tuple[str, ...]:
    """One remark on the values, one on the operators."""
    return _values(here, there, task), _operators(here, there)


def _values(here: Answer, there: Answer, task: str) -> str:
    machines = f"{there.machine} and {here.machine}"
    if here.values.shape != there.values.shape:
        return f"DISAGREES: {machines} answer in the shapes {there.values.shape} and {here.values.shape}"
    for answer in (here, there):
        if not np.isfinite(answer.values).all():
            return f"DISAGREES: {answer.machine} answers NaN or Inf"
    rows = len(here.values)
    if task == ENCODER:
        least = float(_cosines(here.values, there.values).min())
        told, agrees = f"cosine at least {least:.5f} over {rows} sentences", least >= _LEAST_COSINE
    else:
        divergence = _divergence(here.values, there.values)
        same = int((here.values.argmax(axis=1) == there.values.argmax(axis=1)).sum())
        told = f"KL divergence {divergence:.2g} nats, same likeliest token at {same} of {rows} positions"
        agrees = divergence <= _MOST_DIVERGENCE
    return f"{machines} agree: {told}" if agrees else f"DISAGREES: {machines} differ: {told}"


def _cosines(a: Floats, b: Floats) -> NDArray[np.float64]:
    """Row by row; 1 for two rows of zeros, 0 where only one is."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    same = (x == y).all(axis=1).astype(np.float64)
    result: NDArray[np.float64] = np.where(norms > 0, (x * y).sum(axis=1) / np.where(norms > 0, norms, 1.0), same)
    return result


def _divergence(a: Floats, b: Floats) -> float:
    """Mean KL(a‖b) over rows of logits [nats per token]."""
    p, q = _log_softmax(a), _log_softmax(b)
    return float(max(0.0, (np.exp(p) * (p - q)).sum(axis=1).mean()))


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return result


def _operators(here: Answer, there: Answer) -> str:
    if not there.operators:
        return f"{there.machine}: this runtime does not tell its operators"
    if there.operators == here.operators:
        return f"operators on {there.machine}, the same as on {here.machine}: {_listed(there.operators)}"
    names = sorted(set(here.operators) | set(there.operators))
    differ = [
        f"{n} {there.operators.get(n, 0)} instead of {here.operators.get(n, 0)}"
        for n in names
        if there.operators.get(n, 0) != here.operators.get(n, 0)
    ]
    return f"operators on {there.machine} differ from {here.machine}'s: {', '.join(differ[:_MOST_KINDS])}"


def _listed(operators: Mapping[str, int]) -> str:
    """The most frequent first, then in the order of their names."""
    ordered = sorted(operators.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{name} {count}" for name, count in ordered[:_MOST_KINDS]]
    more = len(ordered) - len(shown)
    return ", ".join(shown) + (f" and {more} more kinds" if more else "")
