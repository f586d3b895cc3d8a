"""The torch lowering of a contraction: modules in place of nn.Linear and nn.Embedding, for evaluation and healing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edgec.contraction import Contraction, core_shapes, run
from edgec.fit import Factors


class TorchOps:
    """`edgec.contraction.Ops` over torch tensors. Leading axes pass through; the dense matrix is never formed."""

    def __init__(self, cores: Mapping[str, Tensor] | nn.ParameterDict) -> None:
        self.cores = cores

    def reshape(self, x: Tensor, shape: tuple[int, ...], trailing: int) -> Tensor:
        return x.reshape(x.shape[: x.dim() - trailing] + shape)

    def transpose(self, x: Tensor, perm: tuple[int, ...]) -> Tensor:
        lead = x.dim() - len(perm)
        return x.permute(*range(lead), *(lead + p for p in perm))

    def matmul(self, x: Tensor, core: str) -> Tensor:
        return nn.functional.linear(x, self.cores[core])

    def block_matmul(self, x: Tensor, core: str) -> Tensor:
        blocks = self.cores[core]
        g, b, _ = blocks.shape
        return torch.einsum("...gj,gij->...gi", x.reshape(*x.shape[:-1], g, b), blocks).reshape(x.shape)

    def scale(self, x: Tensor, core: str) -> Tensor:
        return x * self.cores[core]

    def reduce_sum(self, x: Tensor, axis: int, trailing: int) -> Tensor:
        return x.sum(dim=x.dim() - trailing + axis)

    def gather(self, ids: Tensor, core: str) -> Tensor:
        return nn.functional.embedding(ids, self.cores[core])

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Factored(nn.Module):
    """A layer computed by a contraction: x [..., in] (token ids [...] for a lookup) → [..., out].

    The bias [out] is kept outside and added last.

    The cores are ordinary parameters holding the values that the stored numbers stand for, so that healing can
    train them. `weight` does not exist on purpose: whoever wants the dense matrix must go through
    `edgec.fit.Factors.dense`.
    """

    def __init__(self, contraction: Contraction, bias: Tensor | None = None) -> None:
        super().__init__()
        self.contraction = contraction
        self.cores = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(shape)) for name, shape in core_shapes(contraction).items()}
        )
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def from_factors(cls, factors: Factors, bias: Tensor | None = None) -> Factored:
        with torch.device("meta"):
            module = cls(factors.contraction)
        for name, values in factors.values().items():
            module.cores[name] = nn.Parameter(torch.from_numpy(values.copy()), requires_grad=False)
        module.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        return module

    def forward(self, x: Tensor) -> Tensor:
        y = run(self.contraction.steps, TorchOps(self.cores), x, self.contraction.start)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        cores = ", ".join(f"{name} {list(core.shape)}" for name, core in self.cores.items())
        return f"{self.contraction.in_features} → {self.contraction.out_features}: {cores}"


class FactoredLinear(Factored):
    """Stands in for nn.Linear."""


class FactoredEmbedding(Factored):
    """Stands in for nn.Embedding (without its padding index, which only matters to gradients)."""
