"""A GGUF file's tensors where ggml can compute with them, without a second copy of any in memory.

The file is mapped. A weight that is multiplied with is packed as this CPU's fastest kernels read it, where they have
such a form (worth 1.3× in decode and 2× in prefill for Q4_0), tensor by tensor, and the pages of the file that it came
from are dropped at once. Everything else is read from the mapping itself, except rows of the token table: they are
read from the file, because the kernel maps 16 pages around each row that a graph touches, and after a prompt that is
the table.
"""

from __future__ import annotations

import logging
import mmap
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgec.errors import CheckpointError
from edgec.gguf_header import GgufHeader, GgufTensor
from edgec.runtime.ggml.library import CPU, USAGE_WEIGHTS
from edgec.runtime.ggml.tensors import Buffer, Context, Device, Tensor

logger = logging.getLogger(__name__)

ALIGNMENT = 32
"""What ggml's kernels assume of a tensor's address [bytes]."""

_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14: read the pages in now, not one fault at a time."""


@dataclass(frozen=True)
class Use:
    """How the graph reads a tensor. product: as the weight of a product; plain: in any other way."""

    product: bool = False
    plain: bool = False


class Weights:
    """Tensors by name: `product(name)` to multiply with, `plain(name)` to look rows up in, add or scale by."""

    def __init__(self, device: Device, header: GgufHeader, uses: Mapping[str, Use], *, pack: bool = True) -> None:
        """Loads what `uses` names. pack: off only to compare with a llama.cpp that does not repack.

        Raises CheckpointError.
        """
        if header.alignment % ALIGNMENT:
            raise CheckpointError(f"{header.path}: alignment {header.alignment}; ggml needs a multiple of {ALIGNMENT}")
        self.device, self.header = device, header
        self._plain: dict[str, Tensor] = {}
        self._product: dict[str, Tensor] = {}
        self._buffers: list[Buffer] = []
        self._contexts: list[Context] = []
        packed = self._packed(uses) if pack and device.kind == CPU else {}
        self._file = header.path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(self._map, np.uint8)
        last = max((t.offset + t.nbytes for t in header.tensors.values()), default=0)
        if last > len(self._bytes):
            raise CheckpointError(f"{header.path}: became shorter while it was opened")
        self._tables = [
            n for n, u in uses.items() if len(header.tensors[n].shape) == 2 and (n in packed or not u.product)
        ]
        unpacked = {n: u for n, u in uses.items() if u.plain or n not in packed}
        if device.kind == CPU:
            self._map_tensors(unpacked)
        else:
            self._copy(list(unpacked), device.memory, self._plain)
        for name, use in unpacked.items():
            if use.product and name not in packed:
                self._product[name] = self._plain[name]
        largest_first = sorted(packed, key=lambda n: -header.tensors[n].nbytes)
        for memory in dict.fromkeys(packed.values()):
            self._copy([n for n in largest_first if packed[n] == memory], memory, self._product)
        self.forget_rows()
        self.packed_bytes = sum(b.nbytes for b in self._buffers[1:]) if device.kind == CPU else 0

    def product(self, core: str) -> Tensor:
        return self._product[core]

    def plain(self, core: str) -> Tensor:
        return self._plain[core]

    def rows(self, name: str, ids: NDArray[np.int32]) -> NDArray[np.uint8]:
        """Rows of a matrix as they are stored: ids [T] → [T, row bytes]. Raises CheckpointError."""
        info = self.header.tensors[name]
        size = info.nbytes // info.shape[0]
        raw = b"".join(os.pread(self._file.fileno(), size, info.offset + int(row) * size) for row in ids)
        if len(raw) != size * len(ids):
            raise CheckpointError(f"{self.header.path}: became shorter while it was in use")
        return np.frombuffer(raw, np.uint8).reshape(len(ids), size)

    def forget_rows(self) -> None:
        """Let go of the pages of lookup tables: the kernel maps many around each row that was read, and after a prompt
        that is most of a table. Rows that come again are read again from the page cache.
        """
        for name in self._tables:
            self._advise(self.header.tensors[name], mmap.MADV_DONTNEED)

    def _packed(self, uses: Mapping[str, Use]) -> dict[str, int]:
        """Tensor → the memory in which its products are fastest, for those that any packed memory takes."""
        memories = self.device.packed_memory()
        asked: dict[tuple[int, tuple[int, ...]], int | None] = {}
        found = {}
        for name, use in uses.items():
            info = self.header.tensors[name]
            if not use.product or len(info.shape) != 2:
                continue
            key = (info.type, info.shape)
            if key not in asked:
                takers = (m for m in memories if self.device.takes_product(m, info.type, *info.shape))
                asked[key] = next(takers, None)
            if (memory := asked[key]) is not None:
                found[name] = memory
        return found

    def _map_tensors(self, uses: Mapping[str, Use]) -> None:
        lib = self.device.lib
        base = self._bytes.ctypes.data
        pointer = lib.backend_cpu_buffer_from_ptr(base, len(self._bytes))
        buffer = Buffer(lib, pointer, "the mapped file")
        lib.backend_buffer_set_usage(buffer.pointer, USAGE_WEIGHTS)
        self._buffers.append(buffer)
        context = self._context(len(uses))
        for name, use in uses.items():
            info = self.header.tensors[name]
            tensor = self._new(context, info)
            if lib.backend_tensor_alloc(buffer.pointer, tensor, base + info.offset) != 0:
                raise CheckpointError(f"{self.header.path}: ggml refuses the tensor {name!r}")
            self._plain[name] = tensor
            if use.product:
                self._advise(info, _POPULATE_READ)

    def _copy(self, names: list[str], memory: int, into: dict[str, Tensor]) -> None:
        """Tensors into another memory, one at a time; the pages that they came from are dropped."""
        lib = self.device.lib
        context = self._context(len(names))
        for name in names:
            into[name] = self._new(context, self.header.tensors[name])
        buffer = self.device.allocate(context, "the weights", memory)
        lib.backend_buffer_set_usage(buffer.pointer, USAGE_WEIGHTS)
        self._buffers.append(buffer)
        for name in names:
            info = self.header.tensors[name]
            self._advise(info, mmap.MADV_WILLNEED)
            self.device.write(into[name], self._bytes[info.offset : info.offset + info.nbytes])
            self._advise(info, mmap.MADV_DONTNEED)

    def _context(self, tensors: int) -> Context:
        context = Context(self.device.lib, tensors)
        self._contexts.append(context)
        return context

    def _new(self, context: Context, info: GgufTensor) -> Tensor:
        tensor = context.new(info.type, *reversed(info.shape))
        if (expected := self.device.lib.nbytes(tensor)) != info.nbytes:
            raise CheckpointError(f"{self.header.path}: {info.name!r} has {info.nbytes} bytes, ggml wants {expected}")
        return tensor

    def _advise(self, info: GgufTensor, advice: int) -> None:
        """Advice about the whole pages of one tensor (dropped ones would be read again: nothing is ever lost)."""
        start = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            self._map.madvise(advice, start, info.offset + info.nbytes - start)
        except OSError as error:  # an older kernel: the first run will be slower
            logger.debug("madvise %d of %s: %s", advice, info.name, error)
