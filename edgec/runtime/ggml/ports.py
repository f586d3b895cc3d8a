"""What Python fills before a graph runs and reads after it.

On a CPU the numpy array *is* the tensor's memory: writing an element is all that a step costs, and 128 thousand logits
are not copied. Elsewhere the array is sent and fetched.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgec.errors import RuntimeUnavailableError
from edgec.runtime.ggml.tensors import Buffer, Context, Device, Tensor

_ALIGNMENT = 64
_VIEWS = frozenset({b"RESHAPE", b"VIEW", b"PERMUTE", b"TRANSPOSE"})


class Memory:
    """A numpy array that tensors of a CPU graph may lie in; it lives as long as any view of `values`."""

    def __init__(self, device: Device, dtype: DTypeLike, count: int) -> None:
        nbytes = max(1, count) * np.dtype(dtype).itemsize
        room = np.empty(nbytes + _ALIGNMENT, np.uint8)
        start = -room.ctypes.data % _ALIGNMENT
        self.values: NDArray[Any] = room[start : start + nbytes].view(dtype)[:count]
        self.address: int = self.values.ctypes.data
        self.lib = device.lib
        self._buffer = Buffer(
            device.lib, device.lib.backend_cpu_buffer_from_ptr(self.address, nbytes), "a graph's ends"
        )

    def hold(self, tensor: Tensor) -> None:
        """The tensor's numbers lie here from now on. Raises RuntimeUnavailableError."""
        if self.lib.backend_tensor_alloc(self._buffer.pointer, tensor, self.address) != 0:
            raise RuntimeUnavailableError("ggml refuses memory of ours for the ends of a graph")


class Input:
    """An input tensor with its array `values` [count]: fill it, then `send`."""

    def __init__(self, device: Device, context: Context, kind: int, dtype: DTypeLike, *ne: int) -> None:
        """kind: ggml's type; dtype: numpy's of the same numbers, or uint8 for the blocks of a quantised type."""
        self.device = device
        self.tensor = context.new(kind, *ne)
        self._memory: Memory | None = None
        count = int(device.lib.nbytes(self.tensor)) // np.dtype(dtype).itemsize
        if device.on_cpu:
            self._memory = Memory(device, dtype, count)
            self._memory.hold(self.tensor)
            self.values = self._memory.values
        else:
            self.values = np.empty(count, dtype)

    def send(self, start: int = 0, stop: int | None = None) -> None:
        """Elements start … stop (all by default) have been filled."""
        if self._memory is None:
            part = self.values[start:stop]
            self.device.write(self.tensor, part, start * part.itemsize)


class Output:
    """Where graphs leave a vector of float32: `values` [count]."""

    def __init__(self, device: Device, count: int) -> None:
        self.device = device
        self._memory = Memory(device, np.float32, count) if device.on_cpu else None
        self.values: NDArray[np.float32] = self._memory.values if self._memory else np.empty(count, np.float32)

    def take(self, tensor: Tensor) -> bool:
        """Let a graph compute this tensor right here, before its memory is planned; False where it cannot."""
        if self._memory is None or self.device.lib.op_desc(tensor) in _VIEWS:
            return False
        self._memory.hold(tensor)
        return True
