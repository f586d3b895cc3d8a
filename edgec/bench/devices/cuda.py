"""An NVIDIA GPU of this machine: `cuda`, `cuda:1`, numbered as nvidia-smi does.

onnxruntime and onnxruntime-genai need their CUDA wheels, GGUF artifacts a llama-cpp-python built with GGML_CUDA, and
torch runs what nothing else does: dense peers and what `edgec compress` wrote, in float16. A runtime without a back end
for the GPU fails its row and says what to install. The worker sees this one GPU only (CUDA_VISIBLE_DEVICES, by its
UUID), because CUDA's own numbers are not nvidia-smi's. A time ends when the values that it is about have been read
back, which waits for everything that was launched before.

Written against the runtimes' documentation and tested as far as a machine without a GPU allows: that each of them
refuses. Not yet tried on hardware, which every row says.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from edgec.bench.devices import _gpu
from edgec.bench.devices._limits import HostLimits
from edgec.bench.devices.local import LocalDevice, run_worker
from edgec.bench.jobs import Job
from edgec.bench.sizes import holds_gguf
from edgec.errors import BenchError, EdgecError
from edgec.runtime.ggml.tensors import gpus
from edgec.runtime.options import import_genai, import_onnxruntime
from edgec.subprocesses import Finished, run

PLUGIN = True
USAGE = "cuda, cuda:1"

_QUERY = ("name", "uuid", "memory.total", "driver_version")
_TIMEOUT_S = 30.0


def create(argument: str) -> CudaDevice:
    """Raises UsageError for what names no GPU, BenchError where the driver lists none of that number."""
    return CudaDevice(_gpu.number("cuda", argument))


def needs() -> tuple[str, ...]:
    missing = []
    if shutil.which("nvidia-smi") is None:
        missing.append("an NVIDIA GPU with its driver (nvidia-smi is not on PATH)")
    if not any(_built_for_it()):
        missing.append(
            "a runtime built for it: onnxruntime-gpu, onnxruntime-genai-cuda, a llama-cpp-python with GGML_CUDA, or a "
            "torch with CUDA"
        )
    return tuple(missing)


class CudaDevice(LocalDevice):
    """One GPU; its worker is a process of this machine."""

    def __init__(self, number: int) -> None:
        super().__init__(HostLimits())
        self._name, self._uuid, self._memory, self._driver = _ask(number)
        self.name = f"cuda:{number}"
        self.notes = (
            "this kind of device has not been tried on hardware yet",
            *_gpu.NOTES,
            "quality is the CPU's, of a compressed folder in float32",
        )

    def describe(self) -> dict[str, str]:
        return {
            "processor": f"{self._name} (CUDA)",
            "memory": f"{self._memory} on the GPU",
            "system": f"{platform.system()}, driver {self._driver}",
            **_gpu.host(super().describe()),
        }

    def measure(self, job: Job, *, timeout_s: float, on_line: Callable[[bytes], bool]) -> Finished:
        if holds_gguf(Path(job.folder)) and not _ggml_has_it():
            raise BenchError(
                "this llama-cpp-python has no CUDA back end; build it with CMAKE_ARGS=-DGGML_CUDA=on, or use "
                "--device vulkan where it has that"
            )
        seen = {"CUDA_VISIBLE_DEVICES": self._uuid}
        return run_worker(replace(job, gpu=0), seen, timeout_s=timeout_s, on_line=on_line)


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


def _ggml_has_it() -> bool:
    """Has ggml a GPU through CUDA? Another back end would measure whichever GPU is its first. Raises EdgecError."""
    return any(gpu.name.startswith("CUDA") for gpu in gpus())


def _built_for_it() -> Iterator[bool]:
    """Does each of the runtimes have a back end for it? One that is not installed has none."""
    askers: tuple[Callable[[], object], ...] = (
        lambda: "CUDAExecutionProvider" in import_onnxruntime().get_available_providers(),
        lambda: import_genai().is_cuda_available(),
        _ggml_has_it,
        # By its version, because importing it takes seconds and no device does. Wheels for Linux without CUDA say so.
        lambda: platform.system() == "Linux" and "+cpu" not in importlib.metadata.version("torch"),
    )
    for ask in askers:
        try:
            yield bool(ask())
        except (EdgecError, importlib.metadata.PackageNotFoundError):
            yield False
