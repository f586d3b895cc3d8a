"""The contract between the harness and its worker: one JSON job in, JSON lines out.

Standard library only, because the worker's side of it is copied to devices. The harness reads every answer as
hostile input: a worker may run on another machine, crash inside a native library, or answer NaN.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from edgec.errors import BenchError

JOB_VERSION = 1
PEER_FILE = "peer.json"
"""In a folder that another tool runs, for comparison: {"loader": a file of edgec.bench.loaders, …}."""
TAILS = ("step_p95_ms", "item_p95_ms")
"""Slow ones among many: one decode step, one sentence. They scatter by nature, so no spread makes them unsettled."""
METRICS = (
    "ttft_ms", "prefill_tok_s", "decode_tok_s", "step_ms", "items_s", "item_ms", "joules_token", "joules_item", *TAILS,
)  # fmt: skip
"""What one timed sample may hold; all are times or rates, so all are finite and above zero."""

_MIN_NUMBER, _MAX_NUMBER = 1e-12, 1e15
_MAX_TEXT = 2000
_MAX_REMARKS = 16
_MAX_CEILINGS = 16


@dataclass(frozen=True)
class Job:
    """One measurement in one process.

    folder: the artifact, as the device sees it. task: "encoder" or "causal-lm". threads, spin: see RuntimeOptions.
    samples: timed samples after `warmup` untimed ones; each repeats its work until `min_sample_s` have passed.
    prompt_tokens, new_tokens, seed: causal LMs; a seeded random prompt, then exactly new_tokens generated.
    sentences: encoders; one batch, and the first of them one by one for the latency of a single sentence.
    kv_cache: see RuntimeOptions. long_prompt_tokens: causal LMs; a second length, to see how memory grows with context;
    0 for none.
    cores, ram_limit_bytes: what the worker holds itself to before it loads its runtime; 0 for no limit.
    gpu: see RuntimeOptions.
    """

    folder: str
    task: str
    threads: int
    spin: str = "run"
    kv_cache: str = ""
    warmup: int = 1
    samples: int = 3
    min_sample_s: float = 0.3
    prompt_tokens: int = 128
    new_tokens: int = 64
    long_prompt_tokens: int = 0
    seed: int = 0
    sentences: tuple[str, ...] = ()
    cores: int = 0
    ram_limit_bytes: int = 0
    gpu: int | None = None
    version: int = JOB_VERSION

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Job:
        """Raises BenchError for anything but a complete job of this version."""
        try:
            record = json.loads(data)
            record["sentences"] = tuple(record["sentences"])
            job = cls(**record)
        except (ValueError, TypeError, KeyError) as error:
            raise BenchError(f"the worker's job is malformed: {error}") from error
        if job.version != JOB_VERSION:
            raise BenchError(f"the worker reads jobs of version {JOB_VERSION}, got {job.version}; update the worker")
        return job


@dataclass
class Answers:
    """What a worker has said so far; filled line by line, so that a death midway keeps what came before.

    runtime_rss_bytes: the process with its runtime imported and nothing loaded. load_peak_rss_bytes: the peak when
    the session is ready. peak_rss_bytes: the peak at the end. mapped_rss_bytes: pages of files that are resident then
    and were not at first. facts: versions and counts, for the row's settings.
    context_rss: (prompt tokens, peak RSS in bytes of generating after them), a short prompt and a long one. ceilings:
    what a roofline job found, by name. remarks: what a device found out about this artifact, for the row's notes.
    """

    samples: list[dict[str, float]] = field(default_factory=list)
    load_s: float | None = None
    runtime_rss_bytes: int | None = None
    load_peak_rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    mapped_rss_bytes: int | None = None
    context_rss: tuple[tuple[float, float], ...] = ()
    ceilings: dict[str, float] = field(default_factory=dict)
    facts: dict[str, str | float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    error: str = ""
    problem: str = ""
    done: bool = False

    def take(self, line: bytes, job: Job) -> bool:
        """Reads one line; False (and `problem` set) when it makes no sense, which ends the worker."""
        try:
            event = json.loads(line)
            if not isinstance(event, dict):
                raise BenchError(f"expected a JSON object, got {type(event).__name__}")
            self._take(event, job)
        except (ValueError, RecursionError) as error:
            self.problem = f"it answered something that is not JSON ({str(error)[:80]}): {_short(line)}"
        except BenchError as error:
            self.problem = f"{error}: {_short(line)}"
        return not self.problem

    def _take(self, event: dict[str, Any], job: Job) -> None:
        kind = event.get("event")
        if kind == "ready":
            self.runtime_rss_bytes = int(_number(event, "runtime_rss_bytes"))
            versions = event.get("versions")
            for key, value in (versions if isinstance(versions, dict) else {}).items():
                self.facts[str(key)[:64]] = str(value)[:64]
        elif kind == "loaded":
            self.load_s = _number(event, "load_s")
            self.load_peak_rss_bytes = int(_number(event, "load_peak_rss_bytes"))
            if "sentence_tokens" in event:
                self.facts["sentence_tokens"] = _number(event, "sentence_tokens")
        elif kind == "sample":
            metrics = event.get("metrics")
            if not isinstance(metrics, dict) or not metrics or not set(metrics) <= set(METRICS):
                raise BenchError("a sample without known metrics")
            if len(self.samples) >= job.samples:
                raise BenchError(f"more than the {job.samples} samples asked for")
            self.samples.append({name: _number(metrics, name) for name in metrics})
        elif kind == "context":
            keys = ("short_tokens", "short_rss_bytes", "long_tokens", "long_rss_bytes")
            short, short_rss, long, long_rss = (_number(event, key) for key in keys)
            if not short < long:
                raise BenchError(f"a long prompt of {long:g} tokens beside a short one of {short:g}")
            self.context_rss = ((short, short_rss), (long, long_rss))
        elif kind == "ceilings":
            values = event.get("values")
            if not isinstance(values, dict) or len(values) > _MAX_CEILINGS:
                raise BenchError("ceilings that are not a few numbers by name")
            self.ceilings = {str(name)[:64]: _number(values, name) for name in values}
        elif kind == "done":
            self.peak_rss_bytes = int(_number(event, "peak_rss_bytes"))
            if "mapped_rss_bytes" in event:
                self.mapped_rss_bytes = int(_number(event, "mapped_rss_bytes"))
            self.done = True
        elif kind == "remark":
            if len(self.remarks) >= _MAX_REMARKS:
                raise BenchError(f"more than {_MAX_REMARKS} remarks")
            self.remarks.append(str(event.get("text", ""))[:_MAX_TEXT])
        elif kind == "error":
            self.error = str(event.get("message", ""))[:_MAX_TEXT] or "the worker failed without a message"
        else:
            raise BenchError("an unknown event")


def _number(record: dict[str, Any], key: str) -> float:
    """A finite number above zero. Raises BenchError: a time or a size is never anything else."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BenchError(f"{key} is not a number")
    if not _MIN_NUMBER < value < _MAX_NUMBER:  # not isfinite, which an integer of 400 digits breaks
        told = value if isinstance(value, float) or abs(value) < _MAX_NUMBER else "too large"
        raise BenchError(f"{key} is {told}, which no measurement can be")
    return float(value)


def _short(line: bytes) -> str:
    return ascii(line[:120].decode("utf-8", "replace"))
