"""What is seen while a block runs: second moments of the inputs of its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgec.errors import NumericsError
from edgec.moments import SecondMoment


class Stop(Exception):  # noqa: N818 (nothing went wrong)
    """What was to be seen has been seen; the rest of the forward pass is not needed."""


class Moments:
    """Sums of x xᵀ over the unmasked rows, in float64; products in float32, batch by batch, as `activations` does."""

    def __init__(self, masks: Sequence[Tensor], count: int) -> None:
        self.masks, self.count = masks, count
        self.seeing = True
        self._totals: dict[str, Tensor] = {}
        self._batch, self._stop = 0, False
        self._seen: set[str] = set()

    def start(self, batch: int, *, stop: bool) -> None:
        """stop: end the pass when every layer has been seen."""
        self._batch, self._stop = batch, stop
        self._seen.clear()

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not self.seeing:
                return
            x: Tensor = inputs[0]
            rows, mask = x.detach().reshape(-1, x.shape[-1]).float(), self.masks[self._batch]
            if len(rows) == mask.numel():
                rows = rows[mask.reshape(-1)]
            if name not in self._totals:
                self._totals[name] = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
            self._totals[name] += rows.T @ rows
            self._seen.add(name)
            if self._stop and len(self._seen) == self.count:
                raise Stop

        return see

    def finished(self) -> dict[str, SecondMoment]:
        tokens = sum(int(mask.sum()) for mask in self.masks)
        found = {}
        for name in list(self._totals):
            total = self._totals.pop(name).div_(tokens).numpy()
            try:
                found[name] = SecondMoment(total)
            except NumericsError as error:
                raise NumericsError(
                    f"layer {name!r}: its activations are not finite on the calibration text"
                ) from error
        return found
