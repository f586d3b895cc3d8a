"""The twin of `edgec.bench.kernels` for GGUF files: what one weight of each number format costs ggml on this machine.

Times are those of the micro-benchmark, at one shape. Memory is what the two runtimes are known to hold, and asked of
ggml rather than measured on a probe, because there is no GGUF file of single matrices that llama.cpp would load:
llama.cpp maps the file and keeps a second copy of every weight that this CPU's fastest kernels read in a form of their
own; edgec's runtime reads each weight into that form and lets go of the file's pages. A 1B shape's peaks (RESULTS.md,
llama.cpp's Q4_0, Q4_K_M and Q8_0) are what this gives, to 2 %.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from edgec.bench import kernels, microbench_ggml
from edgec.bench.kernels import KernelRate, RuntimeRates
from edgec.quantize.formats import CoreFormat
from edgec.quantize.ggml_formats import EXACT, NUMBERS, real_type
from edgec.runtime.ggml.tensors import Device
from edgec.runtime.options import physical_cores

_SECONDS = 4.0


def measure(
    formats: Sequence[str], shape: tuple[int, int], rows: int, *, mapped: bool, threads: int = 0
) -> RuntimeRates:
    """shape: (out, in) of the typical matrix. mapped: llama.cpp runs the file; False: edgec's own runtime does.

    A format whose blocks do not divide the rows is measured as the type that llama.cpp falls back to. Raises
    BenchError, RuntimeUnavailableError without llama-cpp-python.
    """
    threads = threads or physical_cores()
    load = os.getloadavg()[0] / physical_cores()
    empty = kernels.probe("", "llama_cpp", rows, threads)["runtime_rss_bytes"]
    n, k = shape
    kinds = {name: real_type(EXACT.get(name, name.upper()), k) for name in formats}
    samples = microbench_ggml.measure(
        list(dict.fromkeys(kinds.values())), [shape], [rows], threads=threads, seconds=_SECONDS
    )
    times = {kind: ms for _, _, kind, _, ms in samples}
    device = Device(threads)
    rates = {}
    for name, kind in kinds.items():
        seconds, packed = times[kind] / 1e3, device.fastest_memory(NUMBERS[kind], n, k) is not None
        rates[name] = KernelRate(
            name,
            rows,
            threads,
            1e9 * seconds / (n * k),
            1.0 + (mapped and packed),
            CoreFormat.parse(name).stored_bytes(shape) / seconds / 1e9,
        )
    # What llama.cpp and edgec allocate to compute in is counted with the activations.
    return RuntimeRates(int(empty), 0, load, rates)
