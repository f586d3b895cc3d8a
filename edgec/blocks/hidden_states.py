"""The hidden states of all batches between two blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgec import limits


class HiddenStates:
    """One hidden state [B, T, d] per batch, float32: in memory up to `cap_bytes` in all, in files of `folder` beyond,
    which begin with `name`.

    Files are read and written whole: pages of a memory map would count as the process's memory all the same.
    """

    def __init__(self, folder: Path, cap_bytes: int = limits.MAX_HIDDEN_BYTES, name: str = "hidden") -> None:
        self.folder, self.cap_bytes, self.name = folder, cap_bytes, name
        self._kept: dict[int, Tensor] = {}
        self._shapes: dict[int, torch.Size] = {}

    def put(self, batch: int, hidden: Tensor) -> None:
        """Replace the state of one batch."""
        hidden = hidden.detach().float().contiguous()
        self._kept.pop(batch, None)
        held = sum(h.numel() for h in self._kept.values()) + hidden.numel()
        self._shapes[batch] = hidden.shape
        if held * hidden.element_size() <= self.cap_bytes:
            self._kept[batch] = hidden
        else:
            hidden.numpy().tofile(self._file(batch))

    def get(self, batch: int) -> Tensor:
        if batch in self._kept:
            return self._kept[batch]
        return torch.from_numpy(np.fromfile(self._file(batch), np.float32)).reshape(self._shapes[batch])

    def _file(self, batch: int) -> Path:
        return self.folder / f"{self.name}-{batch:06d}.f32"
