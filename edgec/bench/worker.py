"""The measuring process: `python -m edgec.bench.worker`, a JSON job on stdin, JSON lines on stdout.

Small on purpose (standard library, numpy, one runtime), because its own memory is part of what it reports and
because it is copied to devices that have nothing else. A fresh one runs for every measurement: allocators, page
tables and thread pools that an earlier model warmed or fragmented would otherwise be part of the next one's result.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import IO, Any, cast

from edgec import plugins
from edgec.bench import energy, roofline
from edgec.bench.energy import Meter
from edgec.bench.jobs import PEER_FILE, Job
from edgec.errors import BenchError, EdgecError
from edgec.runtime.artifact import Loader, find_loader
from edgec.runtime.interfaces import CAUSAL_LM, ENCODER, CausalLM, Encoder
from edgec.runtime.layout import is_compressed, read_json
from edgec.runtime.options import RuntimeOptions, one_per_core

TORCH = "torch_models"
"""The loader of what torch runs."""
_SINGLES = 8
"""Sentences that are timed one by one in each sample [count]."""
_LEAST_LATENCIES = 24
"""Fewest of their latencies, so that a 95th percentile is not simply the slowest [count]."""


def main() -> int:
    """Reads the job, measures, answers. Exit status 0 when the answers are complete."""
    answers = _protected_stdout()
    _die_with_parent()

    def say(event: str, **values: Any) -> None:
        answers.write(json.dumps({"event": event, **values}) + "\n")
        answers.flush()

    try:
        measure(Job.from_json(sys.stdin.buffer.read()), say)
    except EdgecError as error:
        say("error", kind=type(error).__name__, message=str(error))
        return error.exit_code
    except MemoryError:
        say("error", kind="MemoryError", message="out of memory; use a smaller model, batch or context")
        return 1
    except Exception as error:  # noqa: BLE001 - a runtime's own exception: the row fails with its text
        say("error", kind=type(error).__name__, message=f"{type(error).__name__}: {error}")
        return 1
    return 0


def measure(job: Job, say: Callable[..., None]) -> None:
    """Runs one job; `say(event, **values)` gets each answer as it is known."""
    _hold_back(job)
    folder = Path(job.folder)
    if job.task == roofline.ROOFLINE:
        say("ceilings", values=roofline.measure(folder, job.threads, job.ram_limit_bytes))
        say("done", peak_rss_bytes=memory()[1])
        return
    loader = loader_of(folder)
    versions = loader.prepare()
    meter, told = energy.find() if job.gpu is None else (None, "the GPU's is not measured")
    files_before = file_pages()
    say("ready", runtime_rss_bytes=memory()[0], versions={**versions, "energy": told})
    started = time.perf_counter()
    options = RuntimeOptions(job.threads, cast(Any, job.spin), kv_cache=job.kv_cache, gpu=job.gpu)
    model = loader.load(folder, options)
    if warm := getattr(loader, "warm", None):
        warm(model, job)
    load_s = time.perf_counter() - started
    if model.task != job.task:
        raise BenchError(f"{folder} holds a model for {model.task}, not for {job.task}")
    loaded: dict[str, Any] = {"load_s": load_s, "load_peak_rss_bytes": memory()[1]}
    if model.task == ENCODER:
        encoder = cast(Encoder, model)
        if not job.sentences:
            raise BenchError("an encoder's job needs sentences")
        loaded["sentence_tokens"] = encoder.token_count(job.sentences) / len(job.sentences)
        sample = _encoder_sampler(encoder, job, meter)
    elif model.task == CAUSAL_LM:
        sample = _causal_sampler(cast(CausalLM, model), job, meter)
    else:
        raise BenchError(f"the worker cannot measure the task {model.task!r}")
    say("loaded", **loaded)
    for number in range(job.warmup + job.samples):
        warm = number < job.warmup
        metrics = sample(0.0 if warm else job.min_sample_s)
        if not warm:
            say("sample", metrics=metrics)
    ended: dict[str, Any] = {"peak_rss_bytes": memory()[1]}
    if (mapped := file_pages() - files_before) > 0:
        ended["mapped_rss_bytes"] = mapped
    if model.task == CAUSAL_LM and job.long_prompt_tokens:
        _say_growth(cast(CausalLM, model), job, say)
    say("done", **ended)


def loader_of(folder: Path) -> Loader:
    """The runtime that the folder's files are for, or the tool that runs it where edgec is installed."""
    if not (name := tool_of(folder)):
        return find_loader(folder)
    try:
        return cast(Loader, plugins.load("edgec.bench.loaders", name))
    except ImportError as error:
        raise BenchError(f"{name} runs where edgec is installed, not on a device ({error})") from error


def tool_of(folder: Path) -> str:
    """The file of `edgec.bench.loaders` that runs a folder: a peer's, or torch for what `edgec compress` wrote. "" for
    an artifact, which `edgec.runtime` loads.
    """
    if (folder / PEER_FILE).is_file():
        return str(read_json(folder / PEER_FILE).get("loader"))
    return TORCH if is_compressed(folder) else ""


def _encoder_sampler(model: Encoder, job: Job, meter: Meter | None) -> Callable[[float], dict[str, float]]:
    """Sentences per second at one batch and the latency of a single sentence; tokenization is part of both."""
    singles = job.sentences[:_SINGLES]

    def sample(min_seconds: float) -> dict[str, float]:
        mark = meter.mark() if meter else None
        batches, started = 0, time.perf_counter()
        while True:
            model.embed(job.sentences, batch_size=len(job.sentences))
            batches += 1
            elapsed = time.perf_counter() - started
            if elapsed >= min_seconds:
                break
        joules = meter.joules(mark) if meter else 0.0
        latencies: list[float] = []
        while len(latencies) < (_LEAST_LATENCIES if min_seconds else 1):
            for sentence in singles:
                begun = time.perf_counter()
                model.embed([sentence])
                latencies.append(time.perf_counter() - begun)
        done = batches * len(job.sentences)
        return {
            "items_s": done / elapsed,
            "item_ms": 1e3 * median(latencies),
            "item_p95_ms": 1e3 * _p95(latencies),
            **_each("joules_item", joules, done),
        }

    return sample


def _p95(values: Sequence[float]) -> float:
    """The 95th percentile, a value that was measured: the smallest that at least 95 % do not exceed."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def _each(name: str, joules: float, count: int) -> dict[str, float]:
    """Energy of one; nothing where no meter told, or where a coarse one did not move."""
    return {name: joules / count} if joules > 0 and count else {}


def _prompt(model: CausalLM, tokens: int, seed: int) -> list[int]:
    """Random but seeded, so that every contestant with the same vocabulary sees the same ids."""
    chooser = random.Random(seed)  # noqa: S311 - reproducible, not secret
    return [chooser.randrange(model.vocab_size) for _ in range(tokens)]


def _causal_sampler(model: CausalLM, job: Job, meter: Meter | None) -> Callable[[float], dict[str, float]]:
    """Time to first token (cache allocation and prefill), then the rate of the tokens after it, and their energy."""
    prompt = _prompt(model, job.prompt_tokens, job.seed)
    _ = model.ends  # llama.cpp is asked about every token; not while the first one is timed

    def sample(min_seconds: float) -> dict[str, float]:
        first: list[float] = []
        rest: list[float] = []
        steps: list[float] = []
        joules = 0.0
        while True:
            begun = time.perf_counter()
            tokens = model.forced(prompt, job.new_tokens)
            next(tokens)
            prefilled = time.perf_counter()
            mark = meter.mark() if meter else None  # may be slow to read
            stepping = ended = time.perf_counter()
            count = 1
            for _ in tokens:
                before, ended = ended, time.perf_counter()
                steps.append(ended - before)
                count += 1
            joules += meter.joules(mark) if meter else 0.0
            if count != job.new_tokens:
                raise BenchError(f"the runtime generated {count} tokens instead of {job.new_tokens}")
            first.append(prefilled - begun)
            rest.append(ended - stepping)
            if sum(first) + sum(rest) >= min_seconds:
                break
        result = {"ttft_ms": 1e3 * fmean(first), "prefill_tok_s": job.prompt_tokens / fmean(first)}
        if job.new_tokens > 1:
            result["decode_tok_s"] = (job.new_tokens - 1) / fmean(rest)
            result |= {"step_ms": 1e3 * median(steps), "step_p95_ms": 1e3 * _p95(steps)}
            result |= _each("joules_token", joules, (job.new_tokens - 1) * len(rest))
        return result

    return sample


def _say_growth(model: CausalLM, job: Job, say: Callable[..., None]) -> None:
    """The peak of generating after the usual prompt, then after a long one. What earlier work left behind is in both,
    and nothing is said where the model's context is too short for a prompt twice as long.
    """
    if getattr(model, "compiled", False):  # for another length it compiles anew, which is all that would be seen
        return
    new = min(2, job.new_tokens)
    lengths = (job.prompt_tokens, min(job.long_prompt_tokens, model.context_length - new))
    if lengths[1] < 2 * lengths[0]:
        return
    peaks = []
    for tokens in lengths:
        _forget_peak()
        for _ in model.forced(_prompt(model, tokens, job.seed), new):
            pass
        peaks.append(memory()[1])
    say(
        "context",
        short_tokens=lengths[0],
        short_rss_bytes=peaks[0],
        long_tokens=lengths[1],
        long_rss_bytes=peaks[1],
    )


def _forget_peak() -> None:
    """Linux: the peak becomes what is resident now (proc(5), clear_refs). Elsewhere the older peak stays in both."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory() -> tuple[int, int]:
    """Resident set now and at its peak [bytes], mapped model files included.

    Linux: VmRSS and VmHWM of /proc/self/status. `ru_maxrss` is not used there: it survives exec, so a worker that
    was started by a large process would report that process's peak.
    """
    status = _status()
    if "VmRSS" in status and "VmHWM" in status:
        return status["VmRSS"], status["VmHWM"]
    try:
        import resource
    except ImportError as error:
        raise BenchError("this platform does not tell a process its own memory") from error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def file_pages() -> int:
    """Pages of files among the resident set [bytes], which the system may drop and read again; 0 where it does not
    tell.
    """
    return _status().get("RssFile", 0)


def _status() -> dict[str, int]:
    """The sizes in /proc/self/status [bytes] by name; nothing where there is no such file."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        sizes = (line.partition(":") for line in lines if line.endswith(" kB"))
        return {name: int(size.split()[0]) * 1024 for name, _, size in sizes}
    return {}


def _hold_back(job: Job) -> None:
    """Fewer cores (one logical processor of each) and less private memory, before the runtime counts either.

    RLIMIT_DATA, not RLIMIT_AS: space that is only reserved, and mapped model files, cost no memory of their own.
    """
    if job.cores:
        chosen = one_per_core(os.sched_getaffinity(0))[: job.cores]
        if len(chosen) < job.cores:
            raise BenchError(f"{job.cores} cores wanted, {len(chosen)} are there")
        os.sched_setaffinity(0, chosen)
    if job.ram_limit_bytes:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (job.ram_limit_bytes, job.ram_limit_bytes))


def _protected_stdout() -> IO[str]:
    """A private copy of stdout for the answers; whatever native libraries print goes to stderr instead."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _die_with_parent() -> None:
    """Linux: a worker must not keep the cores busy when the harness was killed."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(main())
