"""An NVIDIA GPU of this machine: `cuda`, `cuda:1`. Every runtime that has a back end for it computes there and nowhere
else; one that has none fails its row with what to install.

onnxruntime and onnxruntime-genai need their CUDA wheels, GGUF artifacts a llama-cpp-python built with GGML_CUDA or
GGML_VULKAN, and torch runs what nothing else does: dense peers and what `edgec compress` wrote, in float16. A time ends
when the values that it is about have been read back, which waits for everything that was launched before.

Written against the runtimes' documentation and tested as far as a machine without a GPU allows: that each of them
refuses instead of computing on the CPU. Not yet tried on hardware, which every row says.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import replace

from edgec.bench.devices._limits import HostLimits
from edgec.bench.devices.local import LocalDevice
from edgec.bench.jobs import Job
from edgec.errors import BenchError, EdgecError, UsageError
from edgec.runtime.options import MAX_GPU, import_genai, import_onnxruntime
from edgec.subprocesses import Finished, run

PLUGIN = True
USAGE = "cuda, cuda:1"

_QUERY = ("name", "memory.total", "driver_version")
_TIMEOUT_S = 30.0


def create(argument: str) -> CudaDevice:
    """Raises UsageError for what names no GPU, BenchError where the driver lists none of that number."""
    if not re.fullmatch(r"\d{0,2}", argument) or int(argument or 0) > MAX_GPU:
        raise UsageError(f"device 'cuda:{argument}': expected cuda, or cuda:N for GPU number N of this machine")
    return CudaDevice(int(argument or 0))


def needs() -> tuple[str, ...]:
    missing = []
    if shutil.which("nvidia-smi") is None:
        missing.append("an NVIDIA GPU with its driver (nvidia-smi is not on PATH)")
    elsewhere = {"onnxruntime-gpu": _onnxruntime, "onnxruntime-genai-cuda": _genai, "torch built for CUDA": _torch}
    missing += [f"{name}, for what runs on it" for name, there in elsewhere.items() if not there()]
    if not _ggml():
        missing.append("a llama-cpp-python built with GGML_CUDA or GGML_VULKAN, for GGUF artifacts")
    return tuple(missing)


class CudaDevice(LocalDevice):
    """One GPU; its worker is a process of this machine."""

    def __init__(self, number: int) -> None:
        super().__init__(HostLimits())
        self._number = number
        self._told = _ask(number)
        self.name = f"cuda:{number}"
        self.notes = (
            "this kind of device has not been tried on hardware yet",
            "peak RAM is the process's; what lies in the GPU's own memory is not in it",
        )

    def describe(self) -> dict[str, str]:
        name, memory, driver = self._told
        return {
            "processor": f"{name} (CUDA)",
            "memory": f"{memory} on the GPU",
            "system": f"{platform.system()} {platform.release()}, driver {driver}",
            "python": platform.python_version(),
        }

    def measure(self, job: Job, *, timeout_s: float, on_line: Callable[[bytes], bool]) -> Finished:
        return super().measure(replace(job, gpu=self._number), timeout_s=timeout_s, on_line=on_line)


def _ask(number: int) -> tuple[str, ...]:
    """What the driver says of one GPU, in the order of `_QUERY`. Raises BenchError."""
    if shutil.which("nvidia-smi") is None:
        raise BenchError("device 'cuda': nvidia-smi is not on PATH; it comes with NVIDIA's driver")
    wanted = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader", f"--id={number}"]
    done = run(wanted, timeout_s=_TIMEOUT_S)
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    told = tuple(part.strip()[:100] for part in lines[0].split(",")) if done.ok and lines else ()
    if len(told) != len(_QUERY):
        raise BenchError(f"device 'cuda:{number}': nvidia-smi lists no such GPU ({done.reason()})")
    return told


def _onnxruntime() -> bool:
    try:
        return "CUDAExecutionProvider" in import_onnxruntime().get_available_providers()
    except EdgecError:
        return False


def _genai() -> bool:
    try:
        return bool(import_genai().is_cuda_available())
    except EdgecError:
        return False


def _torch() -> bool:
    """By its version, which says what it was built for: importing it takes seconds, and no device does."""
    try:
        return "+cpu" not in importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False


def _ggml() -> bool:
    from edgec.runtime.llama_cpp import import_llama_cpp

    try:
        return bool(import_llama_cpp().llama_supports_gpu_offload())
    except EdgecError:
        return False
