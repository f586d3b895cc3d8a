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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edgec.errors import CheckpointError
from edgec.gguf_header import GgufHeader, GgufTensor
from edgec.runtime.ggml.library import USAGE_WEIGHTS
from edgec.runtime.ggml.tensors import Buffer, Context, Device, Tensor, sizes, strides

logger = logging.getLogger(__name__)

ALIGNMENT = 32
"""What ggml's kernels assume of a tensor's address [bytes]."""

_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14: read the pages in now, not one fault at a time."""


_GROUP = 32
"""Rows that a part of a packed stack must be a multiple of [count]: ggml interleaves 4, 8 or 16 of them."""
_OWN_PACKING = b"CPU_REPACK"


@dataclass(frozen=True)
class Use:
    """How the graph reads a tensor. product: as the weight of a product; plain: in any other way."""

    product: bool = False
    plain: bool = False


@dataclass(frozen=True)
class _Stored:
    """A matrix or vector as it lies in the file: one of its tensors, or several stacked (`bundles`)."""

    parts: tuple[GgufTensor, ...]

    @property
    def type(self) -> int:
        return self.parts[0].type

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (sum(p.shape[0] for p in self.parts), *first[1:]) if len(self.parts) > 1 else first

    @property
    def offset(self) -> int:
        return self.parts[0].offset

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parts)

    @property
    def stackable(self) -> bool:
        return len({(p.type, *p.shape[1:]) for p in self.parts}) == 1

    @property
    def adjacent(self) -> bool:
        return all(a.offset + a.nbytes == b.offset for a, b in pairwise(self.parts))


class Weights:
    """Tensors by name: `product(name)` to multiply with, `plain(name)` to look rows up in, add or scale by."""

    def __init__(
        self,
        device: Device,
        header: GgufHeader,
        uses: Mapping[str, Use],
        bundles: Mapping[str, Sequence[str]] | None = None,
        experts: Mapping[str, Sequence[str]] | None = None,
        *,
        pack: bool = True,
    ) -> None:
        """Loads what `uses` names. bundles: name → tensors to multiply with as one, where that takes no second copy
        (`has` tells). experts: the same for tensors of one shape that are asked together (`stack`), and alone as
        before. pack: off only to compare with a llama.cpp that does not repack. Raises CheckpointError.
        """
        if header.alignment % ALIGNMENT:
            raise CheckpointError(f"{header.path}: alignment {header.alignment}; ggml needs a multiple of {ALIGNMENT}")
        self.device, self.header = device, header
        self._plain: dict[str, Tensor] = {}
        self._product: dict[str, Tensor] = {}
        self._buffers: list[Buffer] = []
        self._contexts: list[Context] = []
        self._stored = {name: _Stored((header.tensors[name],)) for name in uses}
        self._asked: dict[tuple[int, tuple[int, ...]], int | None] = {}
        self._pack = pack and device.on_cpu
        self._stacks: dict[str, Tensor] = {}
        uses = self._bundled(uses, bundles or {})
        experts = {name: parts for name, parts in (experts or {}).items() if self._separable(parts, uses)}
        uses = self._bundled(uses, experts)
        packed = {name: memory for name, use in uses.items() if use.product and (memory := self._packing(name))}
        self._file = header.path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._rows = header.path.open("rb", buffering=0)  # of its own: reading ahead helps a mapping, and not rows
        weakref.finalize(self, self._rows.close)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._rows.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        self._bytes = np.frombuffer(self._map, np.uint8)
        last = max((t.offset + t.nbytes for t in header.tensors.values()), default=0)
        if last > len(self._bytes):
            raise CheckpointError(f"{header.path}: became shorter while it was opened")
        self._tables = [
            n for n, u in uses.items() if len(self._stored[n].shape) == 2 and (n in packed or not u.product)
        ]
        unpacked = {n: u for n, u in uses.items() if u.plain or n not in packed}
        if device.on_cpu:
            self._map_tensors(unpacked)
        else:
            self._copy(list(unpacked), device.memory, self._plain)
        for name, use in unpacked.items():
            if use.product and name not in packed:
                self._product[name] = self._plain[name]
        largest_first = sorted(packed, key=lambda n: -self._stored[n].nbytes)
        for memory in dict.fromkeys(packed.values()):
            self._copy([n for n in largest_first if packed[n] == memory], memory, self._product)
        self._split(experts)
        self.forget_rows()
        self.packed_bytes = sum(b.nbytes for b in self._buffers[1:]) if device.on_cpu else 0

    def has(self, bundle: str) -> bool:
        """Can this bundle be multiplied with (`product`)?"""
        return bundle in self._product

    def stack(self, experts: str) -> Tensor | None:
        """(in, out, count) of tensors to be asked together by `mul_mat_id`, where they lie so."""
        return self._stacks.get(experts)

    def product(self, core: str) -> Tensor:
        return self._product[core]

    def plain(self, core: str) -> Tensor:
        return self._plain[core]

    def read_rows(self, name: str, ids: Sequence[int] | NDArray[np.int32], out: NDArray[np.uint8]) -> None:
        """Rows of a matrix as they are stored: ids [T] into out [T · row bytes]. Raises CheckpointError."""
        info = self.header.tensors[name]
        size = info.nbytes // info.shape[0]
        room = out.data
        for at, row in enumerate(ids):
            place = room[at * size : (at + 1) * size]
            if os.preadv(self._rows.fileno(), [place], info.offset + int(row) * size) != size:
                raise CheckpointError(f"{self.header.path}: became shorter while it was in use")

    def forget_rows(self) -> None:
        """Let go of the pages of lookup tables: the kernel maps many around each row that was read, and after a prompt
        that is most of a table. Rows that come again are read again from the page cache.
        """
        for name in self._tables:
            self._advise(self._stored[name], mmap.MADV_DONTNEED)

    def _bundled(self, uses: Mapping[str, Use], bundles: Mapping[str, Sequence[str]]) -> dict[str, Use]:
        """The uses with bundles in place of their parts, where the parts are copied anyway, or lie side by side."""
        found = dict(uses)
        for bundle, names in bundles.items():
            stored = _Stored(tuple(self.header.tensors[name] for name in names))
            if not stored.stackable or any(uses[name] != Use(product=True) for name in names):
                continue
            self._stored[bundle] = stored
            if self._packing(bundle) or not self.device.on_cpu or stored.adjacent:
                found[bundle] = Use(product=True)
                for name in names:
                    del found[name]
        return found

    def _separable(self, names: Sequence[str], uses: Mapping[str, Use]) -> bool:
        """Can these be packed as one matrix, and asked both one by one and together? Only ggml's own packing is known
        to keep groups of rows apart, and the groups must not depend on how many rows there are.
        """
        if any(uses.get(name) != Use(product=True) for name in names):
            return False
        memories = {self._packing(name) for name in names}
        rows, columns = self._stored[names[0]].shape
        memory = memories.pop()
        if memories or memory is None or rows % _GROUP or self.device.lib.backend_buft_name(memory) != _OWN_PACKING:
            return False
        return self.device.takes_experts(memory, self._stored[names[0]].type, rows, columns, len(names))

    def _split(self, experts: Mapping[str, Sequence[str]]) -> None:
        """Views of what was stacked: each part as a matrix, and all as the leaves of one tensor."""
        stacked = {name: parts for name, parts in experts.items() if name in self._product}
        lib, context = self.device.lib, self._context(3 * len(stacked) + 1)
        for name, parts in stacked.items():
            whole = self._product[name]
            columns, rows = sizes(whole)[:2]
            step, count = strides(whole)[1], rows // len(parts)
            views = [lib.view_3d(context.pointer, whole, columns, count, len(parts), step, step * count, 0)]
            for place in range(len(parts)):
                views.append(lib.view_2d(context.pointer, whole, columns, count, step, place * step * count))
            if any(lib.backend_view_init(view) for view in views):
                raise CheckpointError(f"{self.header.path}: ggml refuses the parts of {name!r}")
            self._stacks[name] = views[0]
            self._product |= dict(zip(parts, views[1:], strict=True))

    def _packing(self, name: str) -> int | None:
        """The memory in which its products are fastest, where any packed memory takes this matrix."""
        stored = self._stored[name]
        if not self._pack or len(stored.shape) != 2:
            return None
        key = (stored.type, stored.shape)
        if key not in self._asked:
            self._asked[key] = self.device.fastest_memory(stored.type, *stored.shape)
        return self._asked[key]

    def _map_tensors(self, uses: Mapping[str, Use]) -> None:
        lib = self.device.lib
        base = self._bytes.ctypes.data
        pointer = lib.backend_cpu_buffer_from_ptr(base, len(self._bytes))
        buffer = Buffer(lib, pointer, "the mapped file")
        lib.backend_buffer_set_usage(buffer.pointer, USAGE_WEIGHTS)
        self._buffers.append(buffer)
        context = self._context(len(uses))
        for name, use in uses.items():
            info = self._stored[name]
            tensor = self._new(context, name)
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
            into[name] = self._new(context, name)
        buffer = self.device.allocate(context, "the weights", memory)
        if self.device.on_cpu:
            buffer.use_huge_pages()
        lib.backend_buffer_set_usage(buffer.pointer, USAGE_WEIGHTS)
        self._buffers.append(buffer)
        for name in names:
            parts = self._stored[name].parts
            for part in parts:
                self._advise(part, mmap.MADV_WILLNEED)
            found = [self._bytes[part.offset : part.offset + part.nbytes] for part in parts]
            self.device.write(into[name], found[0] if len(found) == 1 else np.concatenate(found))
            for part in parts:
                self._advise(part, mmap.MADV_DONTNEED)

    def _context(self, tensors: int) -> Context:
        context = Context(self.device.lib, tensors)
        self._contexts.append(context)
        return context

    def _new(self, context: Context, name: str) -> Tensor:
        stored = self._stored[name]
        tensor = context.new(stored.type, *reversed(stored.shape))
        if (expected := self.device.lib.nbytes(tensor)) != stored.nbytes:
            raise CheckpointError(f"{self.header.path}: {name!r} has {stored.nbytes} bytes, ggml wants {expected}")
        return tensor

    def _advise(self, info: GgufTensor | _Stored, advice: int) -> None:
        """Advice about the whole pages of one tensor (dropped ones would be read again: nothing is ever lost)."""
        start = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            self._map.madvise(advice, start, info.offset + info.nbytes - start)
        except OSError as error:  # an older kernel: the first run will be slower
            logger.debug("madvise %d of %s: %s", advice, self.header.path, error)
