"""Stored cores as things that learn, and back: what is trained is exactly what ships.

A quantised core keeps its codes as real numbers in units of one code. The forward pass rounds them, so every loss is
that of the numbers as stored; the backward pass treats rounding as the identity (straight-through estimator, Bengio
et al. 2013, arXiv 1308.3432) and moves each block's scale along the codes that use it (LSQ, Esser et al. 2020, arXiv
1902.08153, eq. 3). In units of codes one learning rate suits 2, 4 and 8 bits. Training dense "latent" weights and
quantising at the end was turned down: at two bits the end result is another model than the one that was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from edgec.compress.apply import apply_factors
from edgec.compress.modules import Factored
from edgec.contraction import Contraction, Gather, walk
from edgec.fit import Core, Factors
from edgec.quantize.formats import QuantizedTensor, storable, storable_scales
from edgec.quantize.ggml_formats import GgmlTensor

_CODE_RATE = 0.01
"""Learning rate of a code [codes per step of Adam]: three hundred steps can move it by a few codes."""
_RELATIVE_RATE = 2e-3
"""Learning rate of everything else, as a share of its root mean square."""
_MARGIN = 0.49
"""How far beyond the last code a trained number may wander [codes]: it must be able to come back."""


class _Quantise(torch.autograd.Function):
    """offsets [n, blocks, block], scales [n, blocks] → round(offsets) · scales, straight through."""

    @staticmethod
    def forward(ctx: Any, offsets: Tensor, scales: Tensor, low: Tensor, high: Tensor) -> Tensor:
        codes = torch.minimum(torch.maximum(offsets.round(), low), high)
        ctx.save_for_backward(codes, scales)
        return codes * scales.unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        codes, scales = ctx.saved_tensors
        return gradient * scales.unsqueeze(-1), (gradient * codes).sum(-1), None, None


class QuantisedCore(nn.Module):
    """A `QuantizedTensor` whose codes and scales learn. Calling it gives the values [n, k] that the runtime will see.

    lora_rank: 0 trains every code; otherwise the codes change by a product of two factors of this rank.
    """

    low: Tensor
    high: Tensor
    start: Tensor
    base_scales: Tensor

    def __init__(self, stored: QuantizedTensor, lora_rank: int = 0) -> None:
        super().__init__()
        self.stored = stored
        n, k = stored.shape
        blocks, block = stored.scales.shape[1], stored.fmt.block
        zeros = np.full((n, blocks), stored.fmt.zero, np.float32)
        if stored.zero_points is not None:
            zeros = stored.zero_points.astype(np.float32)
        offsets = stored.codes.reshape(n, blocks, block).astype(np.float32) - zeros[:, :, None]
        self.register_buffer("low", torch.from_numpy(-zeros[:, :, None]))
        self.register_buffer("high", torch.from_numpy((1 << stored.fmt.bits) - 1 - zeros[:, :, None]))
        self.register_buffer("base_scales", torch.from_numpy(stored.scales.astype(np.float32)))
        self.gain = nn.Parameter(torch.zeros(n, blocks))
        if lora_rank:
            self.register_buffer("start", torch.from_numpy(offsets))
            generator = torch.Generator().manual_seed(n * 1_000_003 + k)
            self.down = nn.Parameter(torch.randn(lora_rank, blocks * block, generator=generator) / lora_rank**0.5)
            self.up = nn.Parameter(torch.zeros(n, lora_rank))
        else:
            self.offsets = nn.Parameter(torch.from_numpy(offsets))
        self.lora_rank = lora_rank

    def forward(self) -> Tensor:
        values = _Quantise.apply(self._offsets(), self._scales(), self.low, self.high)  # type: ignore[no-untyped-call]
        n, k = self.stored.shape
        return cast(Tensor, values).reshape(n, -1)[:, :k]

    def _offsets(self) -> Tensor:
        return self.start + (self.up @ self.down).reshape(self.start.shape) if self.lora_rank else self.offsets

    def _scales(self) -> Tensor:
        """Rounded to bfloat16's eight bits, straight through, as `storable_scales` stores them."""
        scales = self.base_scales * (1 + self.gain)
        return scales + (scales.bfloat16().float() - scales).detach()

    def rates(self) -> Iterator[tuple[nn.Parameter, float]]:
        """Every parameter with its base learning rate."""
        if self.lora_rank:
            yield self.down, _CODE_RATE
            yield self.up, _CODE_RATE
        else:
            size = float(self.offsets.detach().square().mean().sqrt())
            yield self.offsets, max(_CODE_RATE, _RELATIVE_RATE * size)
        yield self.gain, _RELATIVE_RATE

    @torch.no_grad()
    def confine(self) -> None:
        """Keep every trained code within reach of the grid."""
        if not self.lora_rank:
            torch.maximum(self.offsets, self.low - _MARGIN, out=self.offsets)
            torch.minimum(self.offsets, self.high + _MARGIN, out=self.offsets)

    @torch.no_grad()
    def store(self) -> QuantizedTensor:
        """As it ships: the same values that `forward` gives."""
        stored = self.stored
        codes = torch.minimum(torch.maximum(self._offsets().round(), self.low), self.high) - self.low
        scales = storable_scales(self._scales().cpu().numpy())
        flat = codes.to(torch.uint8).reshape(stored.codes.shape).cpu().numpy()
        return QuantizedTensor(stored.fmt, stored.shape, np.ascontiguousarray(flat), scales, stored.zero_points)


class FloatCore(nn.Module):
    """A core that is stored as floats."""

    def __init__(self, stored: np.ndarray[Any, Any]) -> None:
        super().__init__()
        self.dtype = stored.dtype
        self.values = nn.Parameter(torch.from_numpy(stored.astype(np.float32)))

    def forward(self) -> Tensor:
        return self.values

    def rates(self) -> Iterator[tuple[nn.Parameter, float]]:
        yield self.values, _RELATIVE_RATE * float(self.values.detach().square().mean().sqrt())

    def confine(self) -> None:
        """Floats have no grid to leave."""

    @torch.no_grad()
    def store(self) -> np.ndarray[Any, Any]:
        values = self.values.cpu().numpy()
        return np.ascontiguousarray(storable(values) if self.dtype == np.float16 else values)


class FixedCore(nn.Module):
    """A core that stays as it is: one of ggml's own types, or a table that is only looked up, whose rows would cost
    more time than all matrices, and most of them are not met once in a run.
    """

    values: Tensor

    def __init__(self, stored: Core) -> None:
        super().__init__()
        self.stored = stored
        plain = stored.dequantize() if isinstance(stored, QuantizedTensor) else stored.astype(np.float32)
        self.register_buffer("values", torch.from_numpy(np.ascontiguousarray(plain)))

    def forward(self) -> Tensor:
        return self.values

    def rates(self) -> Iterator[tuple[nn.Parameter, float]]:
        return iter(())

    def confine(self) -> None:
        """Nothing moves."""

    def store(self) -> Core:
        return self.stored


AnyCore = QuantisedCore | FloatCore | FixedCore


class _Bank(nn.Module):
    """Stands where `Factored` keeps its parameters: looks a core up by name and computes its values."""

    def __init__(self, cores: Mapping[str, AnyCore]) -> None:
        super().__init__()
        self.by_name = nn.ModuleDict({_safe(name): core for name, core in cores.items()})

    def __getitem__(self, name: str) -> Tensor:
        return cast(Tensor, self.by_name[_safe(name)]())


def _safe(name: str) -> str:
    return name.replace(".", "__")


class Student:
    """A compressed model that learns: `model` computes with the stored numbers, `factors` gives them back.

    Trained are the cores, and every vector that ships as it is (biases, norms): they cost no byte.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        factors: Mapping[str, Factors],
        vectors: Mapping[str, np.ndarray[Any, Any]] = MappingProxyType({}),
        *,
        lora_rank: int = 0,
    ) -> None:
        """model: of the dense architecture with its dense weights; changed in place. vectors: biases and norms to
        start from.
        """
        self.model = model
        self._factors = factors
        apply_factors(model, factors)
        multiplied = {
            id(stored)
            for fitted in factors.values()
            for core, stored in fitted.cores.items()
            if core not in _looked_up(fitted.contraction)
        }
        made: dict[int, AnyCore] = {}
        self._cores: dict[str, dict[str, AnyCore]] = {}
        for name, fitted in factors.items():
            module = model.get_submodule(name)
            assert isinstance(module, Factored)
            own = {}
            for core, stored in fitted.cores.items():
                if id(stored) not in made:
                    made[id(stored)] = _trainable(stored, lora_rank) if id(stored) in multiplied else FixedCore(stored)
                own[core] = made[id(stored)]
            module.cores = cast(Any, _Bank(own))
            self._cores[name] = own
        self._every = list(made.values())
        self._plain: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if ".cores." not in name and parameter.dim() == 1:
                parameter.requires_grad_(True)
                if name in vectors:
                    parameter.data.copy_(torch.from_numpy(vectors[name]))
                self._plain[name] = parameter

    def rates(self) -> list[tuple[nn.Parameter, float]]:
        """Every parameter that learns, with its base learning rate, in a stable order."""
        found = [pair for core in self._every for pair in core.rates()]
        for parameter in self._plain.values():
            size = float(parameter.detach().square().mean().sqrt())
            found.append((parameter, _RELATIVE_RATE * max(size, 1e-3)))
        return found

    def confine(self) -> None:
        for core in self._every:
            core.confine()

    def factors(self) -> dict[str, Factors]:
        """What every layer has become, ready to ship. Cores that layers share stay shared."""
        stored: dict[int, Core] = {id(core): core.store() for core in self._every}
        return {
            name: replace(self._factors[name], cores={core: stored[id(module)] for core, module in own.items()})
            for name, own in self._cores.items()
        }

    def vectors(self) -> dict[str, np.ndarray[Any, Any]]:
        """The biases and norms as they have become, by the model's own names."""
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self._plain.items()}


def _looked_up(contraction: Contraction) -> set[str]:
    """Names of the cores that are only gathered from."""
    return {step.core for step in walk(contraction.steps) if isinstance(step, Gather)}


def _trainable(stored: Core, lora_rank: int) -> AnyCore:
    if isinstance(stored, GgmlTensor):  # scales of scales, and lattices: no step moves them by a little
        return FixedCore(stored)
    if isinstance(stored, QuantizedTensor):
        return QuantisedCore(stored, lora_rank)
    return FloatCore(stored)
