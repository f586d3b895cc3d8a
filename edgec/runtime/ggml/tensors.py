"""Contexts, devices and buffers: who owns which memory.

A tensor is the address of its struct, an int; its sizes `ne` are innermost first, as ggml has them (numpy's reversed).
Contexts hold structs and never data (`no_alloc`): data lies in buffers, which live as long as what made them.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
import weakref
from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from edgec.errors import CheckpointError, RuntimeUnavailableError
from edgec.runtime.ggml.library import CPU, GPU, I32, INTEGRATED_GPU, MAX_DIMS, InitParams, Library, TensorHead, library
from edgec.runtime.llama_opening import FOR_GPUS

logger = logging.getLogger(__name__)

Tensor = int

_HUGE_PAGES = 14
"""MADV_HUGEPAGE, which Python's mmap module names only where it was built with it."""


def sizes(tensor: Tensor) -> tuple[int, ...]:
    """ne [4], innermost first; axes that are not there have size 1."""
    return tuple(TensorHead.from_address(tensor).ne)


def strides(tensor: Tensor) -> tuple[int, ...]:
    """nb [4] in bytes."""
    return tuple(TensorHead.from_address(tensor).nb)


def kind_of(tensor: Tensor) -> int:
    """ggml's number of its type."""
    return int(TensorHead.from_address(tensor).type)


class Context:
    """Room for the structs of at most `tensors` tensors, and of a graph of at most `nodes` nodes."""

    def __init__(self, lib: Library, tensors: int, nodes: int = 0) -> None:
        room = tensors * lib.tensor_overhead() + (lib.graph_overhead_custom(nodes, False) if nodes else 0)
        self.lib, self.nodes = lib, nodes
        self.pointer: int = lib.init(InitParams(room + 256, None, True))
        if not self.pointer:
            raise RuntimeUnavailableError(f"ggml cannot allocate {room} bytes for {tensors} tensors")
        weakref.finalize(self, lib.free, self.pointer)

    def new(self, kind: int, *ne: int) -> Tensor:
        """A tensor of this type without data."""
        tensor: int = self.lib.new_tensor(self.pointer, kind, len(ne), (c_int64 * len(ne))(*ne))
        return tensor

    def graph(self) -> int:
        graph: int = self.lib.new_graph_custom(self.pointer, self.nodes, False)
        return graph


class Buffer:
    """Owns a ggml buffer. Hold on to it as long as anything points into it."""

    def __init__(self, lib: Library, pointer: int | None, what: str) -> None:
        if not pointer:
            raise RuntimeUnavailableError(f"there is no memory for {what}; close other programs")
        self.lib, self.pointer = lib, pointer
        self._finalizer = weakref.finalize(self, lib.backend_buffer_free, pointer)

    @property
    def nbytes(self) -> int:
        return int(self.lib.backend_buffer_get_size(self.pointer))

    def clear(self) -> None:
        self.lib.backend_buffer_clear(self.pointer, 0)

    def use_huge_pages(self) -> None:
        """Linux, memory of the processor, before anything is written: in pages of 2 MB, if the system has them to give
        (madvise(2)). Without asking there are none on most systems, and weights are most of what a token reads.
        (Measured on a 1B shape in Q4_0, two threads, 24 fresh processes in turn: 107.4 tok/s instead of 102.8.)
        """
        if sys.platform != "linux":
            return
        base: int = self.lib.backend_buffer_get_base(self.pointer)
        start = -(-base // mmap.PAGESIZE) * mmap.PAGESIZE
        length = base + self.nbytes - start
        advise = ctypes.CDLL(None, use_errno=True).madvise
        advise.argtypes = (c_void_p, ctypes.c_size_t, c_int)
        if length > 0 and advise(start, length, _HUGE_PAGES) != 0:  # a kernel without them: slower, and as right
            logger.debug("huge pages: %s", os.strerror(ctypes.get_errno()))


@dataclass(frozen=True)
class Gpu:
    """A GPU as ggml tells of it. name: its back end and a number, "Vulkan0"."""

    name: str
    description: str


def gpus() -> tuple[Gpu, ...]:
    """In the order of `RuntimeOptions.gpu`; none where llama-cpp-python was built for none, or finds none.

    Raises RuntimeUnavailableError where that is not installed.
    """
    lib = library()
    told = [(lib.backend_dev_name(gpu), lib.backend_dev_description(gpu)) for gpu in _gpu_devices(lib)]
    return tuple(Gpu(name.decode(), description.decode("utf-8", "replace")) for name, description in told)


def gpu_device(number: int) -> int:
    """ggml's handle of one of them. Raises RuntimeUnavailableError."""
    found = _gpu_devices(library())
    if number < len(found):
        return found[number]
    raise RuntimeUnavailableError(
        f"this llama-cpp-python has {len(found)} GPUs and was asked for number {number}; without a back end for GPUs, "
        f"{FOR_GPUS}"
    )


def _gpu_devices(lib: Library) -> list[int]:
    """Integrated ones only where there is no other, as llama.cpp does it."""
    return _devices(lib, GPU) or _devices(lib, INTEGRATED_GPU)


def _processor(lib: Library) -> int:
    if found := _devices(lib, CPU):
        return found[0]
    raise RuntimeUnavailableError("this llama-cpp-python has no CPU back end; install it anew")


def _devices(lib: Library, kind: int) -> list[int]:
    listed: list[int] = [lib.backend_dev_get(index) for index in range(lib.backend_dev_count())]
    return [device for device in listed if lib.backend_dev_type(device) == kind]


class Device:
    """Where the graphs run: the CPU, or a GPU of the wheel's CUDA, Vulkan or Metal back end, where it has one."""

    def __init__(self, threads: int, gpu: int | None = None) -> None:
        """gpu: its number among ggml's GPUs (integrated ones where there is no other), None for the CPU.

        Raises RuntimeUnavailableError where there is none.
        """
        self.lib = lib = library()
        self.threads, self.on_cpu = threads, gpu is None
        self.device = _processor(lib) if gpu is None else gpu_device(gpu)
        self.name: str = lib.backend_dev_name(self.device).decode()
        self.backend: int = lib.backend_dev_init(self.device, None)
        if not self.backend:
            raise RuntimeUnavailableError(f"the device {self.name} cannot be opened")
        weakref.finalize(self, lib.backend_free, self.backend)
        self.memory: int = lib.backend_dev_buffer_type(self.device)
        if set_threads := self._procedure(b"ggml_backend_set_n_threads", None, c_void_p, c_int):
            set_threads(self.backend, threads)

    def packed_memory(self) -> list[int]:
        """Buffer types in which weights lie as the fastest kernels of this CPU read them, best first; not AMX's, whose
        kernels crash in most builds (`edgec.runtime.llama_opening.uses_amx`).
        """
        listed = self._procedure(b"ggml_backend_dev_get_extra_bufts", ctypes.POINTER(c_void_p), c_void_p)
        found: list[int] = []
        pointers = listed(self.device) if listed else None
        while pointers and pointers[len(found)]:
            found.append(pointers[len(found)])
        return [memory for memory in found if self.lib.backend_buft_name(memory) != b"AMX"]

    def takes_product(self, memory: int, kind: int, rows: int, columns: int) -> bool:
        """Can a weight [rows, columns] of this type in this memory be multiplied with?

        Asked of the device about a product with 512 rows of x, as llama.cpp does; setting a tensor that a packed
        memory does not support crashes.
        """
        context = Context(self.lib, 4)
        weight = context.new(kind, columns, rows)
        product = self.lib.mul_mat(context.pointer, weight, context.new(0, columns, 512))
        return self._supports(product, weight, memory)

    def _supports(self, product: Tensor, weight: Tensor, memory: int) -> bool:
        """Would the device compute this node if the weight lay in that memory?"""
        head = TensorHead.from_address(weight)
        head.buffer = empty = self.lib.backend_buft_alloc_buffer(memory, 0)
        try:
            return bool(self.lib.backend_dev_supports_op(self.device, product))
        finally:
            head.buffer = None
            self.lib.backend_buffer_free(empty)

    def takes_experts(self, memory: int, kind: int, rows: int, columns: int, count: int) -> bool:
        """Can `count` weights [rows, columns] in this memory be multiplied with one vector each, in one operation?"""
        context = Context(self.lib, 5)
        weight = context.new(kind, columns, rows, count)
        ids = context.new(I32, count, 1)
        product = self.lib.mul_mat_id(context.pointer, weight, context.new(0, columns, count, 1), ids)
        return self._supports(product, weight, memory)

    def fastest_memory(self, kind: int, rows: int, columns: int) -> int | None:
        """The packed memory in which products with such a weight are fastest, where any takes it."""
        takers = (memory for memory in self.packed_memory() if self.takes_product(memory, kind, rows, columns))
        return next(takers, None)

    def allocate(self, context: Context, what: str, memory: int | None = None) -> Buffer:
        """Memory for every tensor of `context` that has none yet."""
        pointer = self.lib.backend_alloc_ctx_tensors_from_buft(context.pointer, memory or self.memory)
        return Buffer(self.lib, pointer, what)

    def write(self, tensor: Tensor, values: NDArray[Any], offset: int = 0) -> None:
        """The bytes of a contiguous array into a tensor, from byte `offset` on."""
        self.lib.backend_tensor_set(tensor, values.ctypes.data, offset, values.nbytes)

    def read(self, tensor: Tensor, values: NDArray[Any]) -> None:
        """The first bytes of a tensor into a contiguous array."""
        self.lib.backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)

    def require(self, graph: int) -> None:
        """Raises RuntimeUnavailableError naming an operation that the device does not have; ggml itself would abort."""
        for index in range(self.lib.graph_n_nodes(graph)):
            node = self.lib.graph_node(graph, index)
            if not self.lib.backend_dev_supports_op(self.device, node):
                operation = self.lib.op_desc(node).decode()
                raise RuntimeUnavailableError(f"the device {self.name} cannot do {operation} on {list(sizes(node))}")

    def compute(self, graph: int) -> None:
        status = self.lib.backend_graph_compute(self.backend, graph)
        if status != 0:
            raise CheckpointError(f"ggml failed to compute the graph on {self.name} (status {status})")

    def _procedure(self, name: bytes, result: Any, *arguments: Any) -> Callable[..., Any] | None:
        """A function that a back end may have without exporting it."""
        registry = self.lib.backend_dev_backend_reg(self.device)
        address = self.lib.backend_reg_get_proc_address(registry, name)
        return ctypes.CFUNCTYPE(result, *arguments)(address) if address else None


class Allocator:
    """Memory for what graphs compute on the way, shared by graphs that run one at a time.

    `generation` grows when the memory moved: graphs of an older generation point into memory that is gone.
    """

    def __init__(self, device: Device) -> None:
        self.lib, self.generation, self.nbytes = device.lib, 0, 0
        self.pointer: int = device.lib.gallocr_new(device.memory)
        weakref.finalize(self, device.lib.gallocr_free, self.pointer)

    def place(self, graph: int) -> None:
        if not self.lib.gallocr_alloc_graph(self.pointer, graph):
            self.nbytes, self.generation = 0, self.generation + 1  # ggml gave the old memory back first
            raise RuntimeUnavailableError("there is no memory for activations; close other programs")
        if (now := self.lib.gallocr_get_buffer_size(self.pointer, 0)) != self.nbytes:
            self.nbytes, self.generation = now, self.generation + 1


def padded(sizes_: tuple[int, ...]) -> tuple[int, int, int, int]:
    """ne with ones up to four axes."""
    full = (*sizes_, *(1,) * (MAX_DIMS - len(sizes_)))
    return full[0], full[1], full[2], full[3]
