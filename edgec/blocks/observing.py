"""What is seen while a block runs: second moments of its layers' inputs, and how far they are from the dense model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgec.errors import NumericsError
from edgec.moments import Drift, SecondMoment, Seen


class Stop(Exception):  # noqa: N818 (nothing went wrong)
    """What was to be seen has been seen; the rest of the forward pass is not needed."""


Hook = Callable[[nn.Module, tuple[Any, ...]], None]


class Moments:
    """Sums of x xᵀ over the unmasked rows, in float64; products in float32, batch by batch, as `activations` does.

    Where the dense model's pass over a batch comes first (`start(…, dense=True)`), also sums of (x_dense − x) xᵀ and of
    (r_dense − r) xᵀ, in float32: they are small, and another [k, k] matrix in float64 would be the largest thing in
    memory. addends: layer → the name under which `note` is told r, the tensor that the layer's output is added to.
    """

    def __init__(self, masks: Sequence[Tensor], count: int, addends: Mapping[str, str]) -> None:
        self.masks, self.count, self.addends = masks, count, addends
        self.seeing = True
        self._totals: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._batch, self._stop, self._dense = 0, False, False
        self._seen: set[str] = set()
        self._noted: dict[str, Tensor] = {}
        self._wanted: dict[str, tuple[Tensor, Tensor | None]] = {}

    def start(self, batch: int, *, stop: bool, dense: bool = False) -> None:
        """stop: end the pass when every layer has been seen. dense: the pass is the dense model's."""
        self._batch, self._stop, self._dense = batch, stop, dense
        self._seen.clear()
        self._noted.clear()

    def note(self, addend: str, tensor: Tensor) -> None:
        """An addend of this pass, before the layers run whose outputs are added to it."""
        self._noted[addend] = self._rows(tensor)

    def noting(self, addend: str) -> Hook:
        return lambda _module, inputs: self.note(addend, inputs[0])

    def hook(self, name: str) -> Hook:
        def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not self.seeing:
                return
            rows = self._rows(inputs[0])
            addend = self._noted[self.addends[name]] if name in self.addends else None
            if not self._dense:
                self._add(name, rows, addend)
            elif self._of_all_tokens(inputs[0]):  # a layer that is given some (an expert) may be given others later
                self._wanted[name] = (rows, addend)
            self._seen.add(name)
            if self._stop and len(self._seen) == self.count:
                raise Stop

        return see

    def _of_all_tokens(self, x: Tensor) -> bool:
        return x.numel() == x.shape[-1] * self.masks[self._batch].numel()

    def _rows(self, x: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        return rows[self.masks[self._batch].reshape(-1)] if self._of_all_tokens(x) else rows

    def _add(self, name: str, rows: Tensor, addend: Tensor | None) -> None:
        if name not in self._totals:
            self._totals[name] = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        self._totals[name] += rows.T @ rows
        if name not in self._wanted:
            return
        dense, dense_addend = self._wanted.pop(name)
        _add_to(self._inputs, name, (dense - rows).T @ rows)
        if addend is not None and dense_addend is not None:
            _add_to(self._sums, name, (dense_addend - addend).T @ rows)

    def finished(self) -> dict[str, Seen]:
        """By layer; those that nothing reached are left out. Raises NumericsError naming the layer."""
        tokens = sum(int(mask.sum()) for mask in self.masks)
        found = {}
        for name in list(self._totals):
            total = self._totals.pop(name).div_(tokens).numpy()
            try:
                moment = SecondMoment(total)
            except NumericsError as error:
                raise NumericsError(
                    f"layer {name!r}: its activations are not finite on the calibration text"
                ) from error
            drift = None
            if name in self._inputs:
                sums = self._sums.pop(name).div_(tokens).numpy() if name in self._sums else None
                drift = Drift(self._inputs.pop(name).div_(tokens).numpy(), sums)
            found[name] = Seen(moment, drift)
        return found


def _add_to(totals: dict[str, Tensor], name: str, part: Tensor) -> None:
    if name in totals:
        totals[name] += part
    else:
        totals[name] = part
