"""Contestants against one another on one device: interleaved rounds of fresh processes, medians and how sure
they are.

Every round measures every contestant once, in an order that rotates from round to round, so that a machine that
heats up, throttles or gets a noisy neighbour treats all of them alike. One process gives one value per metric (the
median of its own samples, which are not independent of each other); the spread is that of the processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from edgec import limits
from edgec.bench import ceilings
from edgec.bench.devices import Device, open_device
from edgec.bench.jobs import METRICS, TAILS, Answers, Job
from edgec.bench.reads import Reads, reads_of
from edgec.bench.sizes import artifact_bytes, holds_gguf
from edgec.bench.text import sentences
from edgec.errors import BenchError, EdgecError, UsageError
from edgec.gguf_header import is_gguf
from edgec.records import Measurement, Spread
from edgec.runtime.interfaces import CAUSAL_LM, ENCODER
from edgec.runtime.options import RuntimeOptions, Spin

Progress = Callable[[int, int, str], None]
"""Called with (measurements done, measurements in all, what runs now)."""

_EMPTY = "runtime_rss_bytes"
"""What a worker tells before it opens the artifact: nothing about that, by itself."""
_ONCE = ("load_s", _EMPTY, "load_peak_rss_bytes", "peak_rss_bytes", "mapped_rss_bytes")
_GIVE_UP_AFTER = 2
_DOUBT = 0.1
"""Probability that the true median is outside the interval that is printed."""


@dataclass(frozen=True)
class Contestant:
    """An artifact folder, or a .gguf file, under a name. task: "encoder" or "causal-lm"; "" finds out from the files.

    kv_cache: see RuntimeOptions. quality, notes: shown beside the speed in the same row.
    """

    name: str
    folder: Path
    task: str = ""
    kv_cache: str = ""
    quality: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def resolved_task(self) -> str:
        if self.task:
            return self.task
        return CAUSAL_LM if self.is_gguf or (self.folder / "genai_config.json").is_file() else ENCODER

    @property
    def is_gguf(self) -> bool:
        return holds_gguf(self.folder)


@dataclass(frozen=True)
class BenchSettings:
    """How to measure. threads 0: all physical cores of the device. rounds: fresh processes per contestant.

    samples, warmup, min_sample_s: inside each process. prompt_tokens, new_tokens: causal LMs. batch,
    sentence_words: encoders. spread_bound: interval ÷ median above which a row says that it is unsettled.
    timeout_s: of one process. long_prompt: the second prompt that growth of memory is measured with, so many times the
    first; 0 for none.
    """

    device: str = "local"
    threads: int = 0
    rounds: int = 5
    samples: int = 3
    warmup: int = 1
    min_sample_s: float = 0.3
    prompt_tokens: int = 128
    new_tokens: int = 64
    batch: int = 32
    sentence_words: int = 16
    spread_bound: float = 0.25
    timeout_s: float = 600.0
    spin: Spin = "run"
    seed: int = 0
    long_prompt: int = 4

    def __post_init__(self) -> None:
        RuntimeOptions(self.threads, self.spin)
        whole = {"rounds": 1000, "samples": 1000, "batch": 4096, "sentence_words": 4096}
        whole |= {"prompt_tokens": 1 << 20, "new_tokens": 1 << 20}
        for name, high in whole.items():
            if not 1 <= getattr(self, name) <= high:
                raise UsageError(f"{name} must be between 1 and {high}, got {getattr(self, name)}")
        if self.warmup < 0 or not 0 <= self.min_sample_s <= 60:
            raise UsageError("warmup must not be negative, and min_sample_s must be between 0 and 60 seconds")
        if not 0 < self.timeout_s <= limits.WORKER_TIMEOUT_S:
            raise UsageError(f"timeout_s must be above 0 and at most {limits.WORKER_TIMEOUT_S}, got {self.timeout_s}")
        if self.long_prompt != 0 and not 2 <= self.long_prompt <= 1024:
            raise UsageError(f"long_prompt must be 0, or from 2 to 1024 times the prompt, got {self.long_prompt}")
        if not self.spread_bound > 0:
            raise UsageError(f"spread_bound must be above 0, got {self.spread_bound}")


@dataclass
class _Row:
    """What has been measured of one contestant so far: per metric, one value per process."""

    contestant: Contestant
    job: Job
    bytes: int
    reads: Reads | None = None
    untold: str = ""  # why there are no reads
    values: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, str | float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    failed_in_a_row: int = 0


def run_bench(
    contestants: Sequence[Contestant],
    settings: BenchSettings | None = None,
    progress: Progress | None = None,
    device: Device | None = None,
) -> list[Measurement]:
    """One Measurement per contestant, in the order given. `device`: an open one, instead of `settings.device`.

    A contestant whose workers crash, hang or answer nonsense gets a row that says so (notes starting "failed" or
    "incomplete") and keeps the samples it has; it is not tried again after two failures in a row. Raises BenchError
    when nothing at all could be measured, UsageError for a request that makes no sense.
    """
    settings = settings or BenchSettings()
    check_names(contestants)
    device = device or open_device(settings.device)
    rows = [_row(c, settings, device) for c in contestants]
    asked = any(row.reads is not None for row in rows)
    ceiling = ceilings.ask(device, rows[0].job.threads) if asked else ceilings.Ceilings()
    done, total = 0, len(rows) * settings.rounds
    for round_number in range(settings.rounds):
        turn = round_number % len(rows)
        for row in rows[turn:] + rows[:turn]:
            if row.failed_in_a_row < _GIVE_UP_AFTER:
                if progress:
                    progress(done, total, f"round {round_number + 1}: {row.contestant.name}")
                _measure_once(row, device, settings, round_number)
            done += 1
    if asked and ceiling.values:  # again: a neighbour that was busy at first has made the memory look slow
        ceiling = ceiling.or_higher(ceilings.ask(device, rows[0].job.threads))
    if progress:
        progress(total, total, "")
    if not any(row.values.keys() - {_EMPTY} for row in rows):
        raise BenchError(f"nothing could be measured; {rows[0].contestant.name}: {rows[0].failures[0]}")
    return [_measurement(row, device, settings, ceiling) for row in rows]


def check_names(contestants: Sequence[Contestant]) -> None:
    """Rows are told apart by name. Raises UsageError."""
    names = [c.name for c in contestants]
    if not names or len(set(names)) != len(names):
        raise UsageError(f"a bench needs contestants with different names, got {names}; rename a folder or file")


def _row(contestant: Contestant, settings: BenchSettings, device: Device) -> _Row:
    row = _Row(contestant, _job(contestant, settings, device), artifact_bytes(contestant.folder))
    if row.job.task == CAUSAL_LM:
        try:
            row.reads = reads_of(contestant.folder, contestant.kv_cache or "f16")
        except BenchError as error:
            row.untold = f"no roofline: {error}"
    return row


def _job(contestant: Contestant, settings: BenchSettings, device: Device) -> Job:
    task = contestant.resolved_task()
    if task not in (ENCODER, CAUSAL_LM):
        raise UsageError(f"{contestant.name}: the task {task!r} cannot be measured; expected {ENCODER} or {CAUSAL_LM}")
    if not (contestant.folder.is_dir() or is_gguf(contestant.folder)):
        raise BenchError(f"{contestant.name}: {contestant.folder} is neither a folder nor a .gguf file")
    return Job(
        folder=str(contestant.folder.absolute()),
        task=task,
        threads=settings.threads or device.threads(),
        spin=settings.spin,
        kv_cache=contestant.kv_cache,
        warmup=settings.warmup if device.timed else 1,
        samples=settings.samples if device.timed else 0,
        min_sample_s=settings.min_sample_s,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        long_prompt_tokens=settings.long_prompt * settings.prompt_tokens if task == CAUSAL_LM and device.timed else 0,
        seed=settings.seed,
        sentences=sentences(settings.batch, settings.sentence_words, settings.seed) if task == ENCODER else (),
    )


def _measure_once(row: _Row, device: Device, settings: BenchSettings, round_number: int) -> None:
    """One fresh process; whatever it said before it failed is kept."""
    answers = Answers()
    problem = ""
    try:
        finished = device.measure(
            row.job, timeout_s=settings.timeout_s, on_line=lambda line: answers.take(line, row.job)
        )
        problem = "" if finished.ok else finished.reason()
    except EdgecError as error:  # the device itself: unreachable, gone, without a runtime
        problem = str(error)
    for name in METRICS:
        found = [sample[name] for sample in answers.samples if name in sample]
        if found:
            row.values.setdefault(name, []).append(median(found))
    for name in _ONCE:
        value = getattr(answers, name)
        if value is not None:
            row.values.setdefault(name, []).append(float(value))
    if answers.context_rss:
        (short, short_rss), (long, long_rss) = answers.context_rss
        row.values.setdefault("rss_growth_bytes", []).append(max(0.0, 1000 * (long_rss - short_rss) / (long - short)))
    row.facts.update(answers.facts)
    row.remarks += [remark for remark in answers.remarks if remark not in row.remarks]
    if answers.done and not problem and len(answers.samples) == row.job.samples:
        row.failed_in_a_row = 0
        return
    row.failed_in_a_row += 1
    reason = answers.error or answers.problem or problem or "it ended before it had answered everything"
    kept = f" ({len(answers.samples)} of {row.job.samples} samples kept)" if answers.samples else ""
    row.failures.append(f"round {round_number + 1}: {reason}{kept}")


def _measurement(row: _Row, device: Device, settings: BenchSettings, ceiling: ceilings.Ceilings) -> Measurement:
    metrics = {name: spread(values) for name, values in row.values.items() if device.timed or name != "load_s"}
    measured = any(name in metrics for name in METRICS) if device.timed else "peak_rss_bytes" in metrics
    notes = list(row.contestant.notes) + list(device.notes) + row.remarks
    if row.failures:
        state = "incomplete" if measured else "failed"
        notes += [f"{state}: {failure}" for failure in row.failures]
    notes += _spread_notes(metrics, settings.spread_bound)
    notes += [reason for reason in (row.untold, ceiling.problem if row.reads else "") if reason]
    tokens = settings.prompt_tokens + settings.new_tokens
    decode, read = metrics.get("decode_tok_s"), ceiling.values.get(ceilings.READ)
    placed = None
    if row.reads is not None and decode is not None and read is not None:
        placed = ceilings.place(row.reads, tokens - settings.new_tokens / 2, read, decode.value)
    return Measurement(
        contestant=row.contestant.name,
        device=device.name,
        threads=row.job.threads,
        task=row.job.task,
        settings=_settings(row, settings),
        metrics=metrics if measured else {},
        artifact_bytes=row.bytes,
        quality=dict(row.contestant.quality),
        notes=tuple(notes),
        kv_cache_bytes=round(row.reads.cache_bytes * tokens) if row.reads else 0,
        ceilings=dict(ceiling.values),
        roofline=placed,
    )


def _settings(row: _Row, settings: BenchSettings) -> dict[str, int | float | str]:
    """What a reader needs to repeat the row."""
    result: dict[str, int | float | str] = {
        "rounds": settings.rounds,
        "samples": settings.samples,
        "warmup": settings.warmup,
        "spin": settings.spin,
        "seed": settings.seed,
    }
    if row.job.task == CAUSAL_LM:
        result |= {"prompt_tokens": settings.prompt_tokens, "new_tokens": settings.new_tokens}
    else:
        result |= {"batch": settings.batch, "sentence_words": settings.sentence_words}
    if row.job.kv_cache:
        result["kv_cache"] = row.job.kv_cache
    return result | row.facts


def spread(values: Sequence[float]) -> Spread:
    """Median of one value per process, and the innermost pair of them that has the true median in between with 90 %
    confidence, whatever the distribution: the interval of the sign test. Fewer than five do not allow that; the
    extremes of four, three and two have it in between with 88, 75 and 50 %.

    Quartiles, which say how single processes scatter, were turned down: a second bench seldom agrees within them.
    """
    ordered = sorted(float(value) for value in values)
    if not all(map(math.isfinite, ordered)):
        raise BenchError("a measured value is not finite")
    cut = 0  # values left out at each end
    while 2 * sum(math.comb(len(ordered), k) for k in range(cut + 2)) <= _DOUBT * 2 ** len(ordered):
        cut += 1
    return Spread(median(ordered), ordered[cut], ordered[-1 - cut], len(ordered))


def _spread_notes(metrics: Mapping[str, Spread], bound: float) -> list[str]:
    """A note for every timed metric whose interval is too wide to compare it, or for want of an interval."""
    timed = {name: metrics[name] for name in ("load_s", *METRICS) if name in metrics and name not in TAILS}
    if timed and all(found.n == 1 for found in timed.values()):
        return ["one measurement: no spread is known"]
    notes = []
    for name, found in timed.items():
        if found.n == 1:
            notes.append(f"{name}: one value, no spread is known")
        elif (found.high - found.low) / found.value > bound:
            share = 100 * (found.high - found.low) / found.value
            notes.append(f"unsettled: {name} spreads over {share:.0f} % of its median (bound {100 * bound:.0f} %)")
    return notes
