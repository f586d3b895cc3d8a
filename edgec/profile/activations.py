"""Second moments of what flows into every layer, and curvature of the end-to-end loss at what flows out.

For a layer y = W x, with H = E[x xᵀ] over calibration tokens and G = E[g gᵀ] for the gradient g of the end-to-end
divergence at y, a replacement W̃ adds about ½ tr(G (W − W̃) H (W − W̃)ᵀ) to that divergence: the
Kronecker-factored Gauss–Newton approximation (K-FAC, Martens & Grosse 2015, arXiv 1503.05671, §3). One forward
pass measures H and one backward pass measures G, so layers become comparable without trying each one end to end.
Gradients are of the *model's own* divergence, not of a task: labels are drawn from the model's softmax (causal
LMs), or a Gaussian probe of the embedding (encoders), which makes E[g gᵀ] the exact Gauss–Newton matrix at y.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from edgec.calibration import Batches
from edgec.errors import NumericsError
from edgec.evaluate.embeddings import embed_batch
from edgec.modeling import Layer
from edgec.moments import SecondMoment
from edgec.pooling import Pooling

Array = NDArray[Any]

MAX_CURVATURE = 4096
"""Widest output whose full curvature matrix is kept [features]; wider ones (vocabularies) keep the diagonal."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What flowed through every layer.

    second_moments: layer → H, float32 [in, in]; token frequencies [v] for an embedding. Layers that share an input
    share the array. curvatures: layer → G, float32 [out, out], or its diagonal [out]. tokens: how many were seen.
    """

    second_moments: Mapping[str, Array]
    curvatures: Mapping[str, Array]
    tokens: int
    _shared: dict[int, SecondMoment] = field(default_factory=dict, repr=False)

    def moment(self, name: str) -> SecondMoment | None:
        """The layer's H with its cached factorizations, one for all layers that share the array; None for tables."""
        array = self.second_moments.get(name)
        if array is None or array.ndim != 2:
            return None
        if id(array) not in self._shared:
            self._shared.clear()  # layers come in order: the factorizations of one input at a time are enough
            self._shared[id(array)] = SecondMoment(array)
        return self._shared[id(array)]


class _Collector:
    """Hooks on one model, accumulating in float64 on the CPU; `mask` [B, T] of the batch under way hides padding."""

    def __init__(self, model: transformers.PreTrainedModel, layers: list[Layer]) -> None:
        self.mask: Tensor | None = None
        self.moments: dict[str, Tensor] = {}
        self.curvatures: dict[str, Tensor] = {}
        self.shared: dict[str, str] = {}
        self._last: tuple[Tensor, str] | None = None
        self.handles = [model.get_submodule(layer.name).register_forward_hook(self._hook(layer)) for layer in layers]
        # Weights are frozen, so gradients start at the token embeddings: from there they reach every layer's output.
        table = model.get_input_embeddings()
        self.handles.append(table.register_forward_hook(_require_gradient, prepend=True))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            with torch.no_grad():
                self._see_input(layer, inputs[0])
            if output.requires_grad:
                output.register_hook(lambda gradient: self._see_gradient(layer, gradient))

        return hook

    def _see_input(self, layer: Layer, x: Tensor) -> None:
        if layer.role == "embedding":
            ids = x.expand(self.mask.shape)[self.mask] if self.mask is not None and x.dim() == 2 else x.reshape(-1)
            counts = torch.bincount(ids.reshape(-1), minlength=layer.shape[0]).double()
            self.moments[layer.name] = self.moments.get(layer.name, 0) + counts
            return
        if self._last is not None and self._last[0] is x:  # q, k and v read the same tensor: count it once
            self.shared[layer.name] = self._last[1]
            return
        self._last = (x, layer.name)
        rows = self._rows(x)
        self.moments[layer.name] = self.moments.get(layer.name, 0) + (rows.T @ rows).double()

    def _see_gradient(self, layer: Layer, gradient: Tensor) -> None:
        rows = self._rows(gradient)
        full = layer.shape[1] if layer.role == "embedding" else layer.shape[0]
        add = (rows.T @ rows).double() if full <= MAX_CURVATURE else (rows**2).sum(0).double()
        self.curvatures[layer.name] = self.curvatures.get(layer.name, 0) + add

    def _rows(self, x: Tensor) -> Tensor:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        if self.mask is not None and flat.shape[0] == self.mask.numel():
            flat = flat[self.mask.reshape(-1)]
        return flat


def _require_gradient(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)


def collect(
    model: transformers.PreTrainedModel,
    layers: list[Layer],
    batches: Batches,
    *,
    pooling: Pooling | None,
    curvature: bool = True,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Run the batches through the dense model. pooling: how an encoder's embedding is made; None for a causal LM.

    Raises NumericsError naming the layer whose statistics are not finite.
    """
    collector = _Collector(model, layers)
    generator = torch.Generator().manual_seed(seed)
    try:
        for done, batch in enumerate(batches.items):
            collector.mask = batch["attention_mask"].bool()
            collector._last = None
            with torch.set_grad_enabled(curvature):
                loss = _divergence_probe(model, batch, pooling, generator)
            if curvature:
                loss.backward()
            if progress:
                progress(done + 1, len(batches.items))
    finally:
        collector.close()
    tokens = batches.tokens
    moments = {name: _finished(name, total, tokens) for name, total in collector.moments.items()}
    moments.update({name: moments[first] for name, first in collector.shared.items()})
    items = sum(len(b["input_ids"]) for b in batches.items)
    # Per item of the metric: an encoder's loss is per sentence, a causal LM's per token.
    per = items if pooling is not None else tokens
    curvatures = {name: _finished(name, total, per) for name, total in collector.curvatures.items()}
    return Statistics(moments, curvatures, tokens)


def _divergence_probe(
    model: transformers.PreTrainedModel, batch: dict[str, Tensor], pooling: Pooling | None, generator: torch.Generator
) -> Tensor:
    """A scalar whose gradient g satisfies E[g gᵀ] = Gauss–Newton matrix of the divergence from the model itself."""
    if pooling is not None:
        vectors = embed_batch(model, batch, pooling)
        probe = torch.randn(vectors.shape, generator=generator)
        return (vectors * probe).sum()
    logits = model(**batch).logits
    with torch.no_grad():
        flat = logits.detach().reshape(-1, logits.shape[-1]).softmax(-1)
        labels = torch.multinomial(flat, 1, generator=generator)[:, 0]
    weight = batch["attention_mask"].reshape(-1).to(logits.dtype)
    losses = nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels, reduction="none")
    return (losses * weight).sum()


def _finished(name: str, total: Tensor, count: int) -> Array:
    mean = (total / count).numpy()
    if not np.isfinite(mean).all():
        raise NumericsError(f"layer {name!r}: its activations or gradients are not finite on the calibration text")
    return mean.astype(np.float32)
