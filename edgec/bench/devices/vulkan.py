"""A GPU of this machine, of any maker, through ggml's Vulkan back end: `vulkan`, `vulkan:1`, numbered as ggml does.

GGUF artifacts only: of the runtimes that edgec writes for, ggml alone computes with Vulkan. It passes software drivers
over unless GGML_VK_VISIBLE_DEVICES names them; that is how this device is tested where there is no GPU, and its rows
then say that their times are a processor's. A time ends when the values that it is about have been read back.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from edgec.bench.devices import _gpu
from edgec.bench.devices._limits import HostLimits
from edgec.bench.devices.local import LocalDevice
from edgec.bench.jobs import Job
from edgec.bench.sizes import holds_gguf
from edgec.errors import BenchError, EdgecError
from edgec.runtime.ggml.tensors import Gpu, gpus
from edgec.subprocesses import Finished

PLUGIN = True
USAGE = "vulkan, vulkan:1"

_BUILD = (
    "a llama-cpp-python with Vulkan: CMAKE_ARGS=-DGGML_VULKAN=on pip install --force-reinstall --no-cache-dir "
    "--no-deps llama-cpp-python"
)
_SOFTWARE = re.compile(r"llvmpipe|lavapipe|swiftshader", re.IGNORECASE)


def create(argument: str) -> VulkanDevice:
    """Raises UsageError for what names no GPU, BenchError where ggml lists none of that number."""
    return VulkanDevice(_gpu.number("vulkan", argument))


def needs() -> tuple[str, ...]:
    try:
        return () if any(_listed()) else (f"a GPU with a Vulkan driver, and {_BUILD}",)
    except EdgecError:
        return (_BUILD,)


def _listed() -> Iterator[tuple[int, Gpu]]:
    """(number among all of ggml's GPUs, GPU) of those that Vulkan drives."""
    return ((number, gpu) for number, gpu in enumerate(gpus()) if gpu.name.startswith("Vulkan"))


class VulkanDevice(LocalDevice):
    """One GPU; its worker is a process of this machine."""

    def __init__(self, number: int) -> None:
        super().__init__(HostLimits())
        found = list(_listed())
        if number >= len(found):
            told = ", ".join(gpu.description for _, gpu in found) or "none"
            raise BenchError(f"device 'vulkan:{number}': ggml lists no such GPU ({told}); it needs {_BUILD}")
        self._number, self._card = found[number]
        self.name = f"vulkan:{number}"
        self.notes: tuple[str, ...] = (*_gpu.NOTES, "quality is the CPU's")
        if _SOFTWARE.search(self._card.description):
            self.notes += ("a software driver: these are times of the processor, not of a GPU",)

    def describe(self) -> dict[str, str]:
        around = _gpu.host(super().describe())
        return {"processor": f"{self._card.description} (Vulkan)", "system": platform.system(), **around}

    def measure(self, job: Job, *, timeout_s: float, on_line: Callable[[bytes], bool]) -> Finished:
        folder = Path(job.folder)
        if not holds_gguf(folder):
            raise BenchError(f"{folder.name}: {self.name} runs GGUF artifacts; export with --target gguf")
        return super().measure(replace(job, gpu=self._number), timeout_s=timeout_s, on_line=on_line)
