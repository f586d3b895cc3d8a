"""One contestant in one fresh process: `python -m runtime_tests.ggml.worker JSON` prints one line of JSON.

Both runtimes get the same prompt, choose greedily with numpy, and run with flash attention. Memory is the kernel's own
high-water mark of this process (VmHWM: the resource usage of a child starts at its parent's).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgec.runtime.llama_cpp import import_llama_cpp
from edgec.runtime.llama_opening import model_params

Floats = Any


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


class Ours:
    """edgec.runtime.ggml."""

    def __init__(self, job: dict[str, Any]) -> None:
        from edgec.runtime.ggml.model import GgmlModel
        from edgec.runtime.options import RuntimeOptions

        self.model = GgmlModel(job["file"], RuntimeOptions(threads=job["threads"]))
        self.room = job["prompt"] + job["new"]
        self.computing = 0.0
        compute = self.model.device.compute

        def timed(graph: int) -> None:
            start = time.perf_counter()
            compute(graph)
            self.computing += time.perf_counter() - start

        self.model.device.compute = timed  # type: ignore[method-assign]

    def prefill(self, ids: list[int]) -> Floats:
        self.model.session.start(self.room)
        return self.model.session.prefill(ids)

    def step(self, token: int) -> Floats:
        return self.model.session.step(token)


class Theirs:
    """llama.cpp through llama-cpp-python's C interface."""

    computing = float("nan")

    def __init__(self, job: dict[str, Any]) -> None:
        self.lib = lib = import_llama_cpp()
        params = model_params(lib)
        params.use_mmap = job["mmap"]
        self.model = lib.llama_model_load_from_file(str(job["file"]).encode(), params)
        settings = lib.llama_context_default_params()
        settings.n_ctx = -(-(job["prompt"] + job["new"]) // 256) * 256
        settings.n_batch = settings.n_ubatch = job["prompt"]
        settings.n_threads = settings.n_threads_batch = job["threads"]
        settings.flash_attn_type, settings.no_perf = 1, True
        self.context = lib.llama_init_from_model(self.model, settings)
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model)) or job["vocab"]

    def prefill(self, ids: list[int]) -> Floats:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
        return self._decode(ids)

    def step(self, token: int) -> Floats:
        return self._decode([token])

    def _decode(self, ids: list[int]) -> Floats:
        tokens = (self.lib.llama_token * len(ids))(*ids)
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (self.vocab,))


def prepare(job: dict[str, Any]) -> None:
    """Import what the contestant needs, and load nothing."""
    np.random.default_rng(0)  # imports numpy.random, which is the measurement's and not the runtime's
    import_llama_cpp()
    if job["runtime"] == "ggml":
        from edgec.runtime.ggml import model
        from edgec.runtime.ggml.library import library

        assert model and library()


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Memory in bytes, times in seconds, rates in tokens per second, overhead in ms per decoded token."""
    prepare(job)
    empty = memory("VmRSS")
    make: Callable[[dict[str, Any]], Ours | Theirs] = Ours if job["runtime"] == "ggml" else Theirs
    start = time.perf_counter()
    contestant = make(job)
    load = time.perf_counter() - start
    ids = [int(i) for i in np.random.default_rng(0).integers(3, job["vocab"], job["prompt"])]
    run(contestant, ids, 8)
    prefill, decode, overhead = run(contestant, ids, job["new"])
    return {
        "empty_rss": empty,
        "load_s": load,
        "prefill": len(ids) / prefill,
        "decode": job["new"] / decode,
        "overhead_ms": 1e3 * overhead / job["new"],
        "peak_rss": memory("VmHWM"),
    }


def run(contestant: Ours | Theirs, ids: list[int], new: int) -> tuple[float, float, float]:
    """Seconds of the prefill, of `new` decode steps, and of what of those was not spent inside ggml."""
    start = time.perf_counter()
    token = int(contestant.prefill(ids).argmax())
    prefilled = time.perf_counter()
    computing = contestant.computing
    for _ in range(new):
        token = int(contestant.step(token).argmax())
    decode = time.perf_counter() - prefilled
    return prefilled - start, decode, decode - (contestant.computing - computing)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(json.loads(sys.argv[1]))) + "\n")
