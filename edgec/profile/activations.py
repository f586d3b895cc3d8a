"""Second moments of what flows into every layer, and curvature of the end-to-end loss at what flows out.

For a layer y = W x, with H = E[x xᵀ] over calibration tokens and G = E[g gᵀ] for the gradient g of the end-to-end
divergence at y, a replacement W̃ adds about ½ tr(G (W − W̃) H (W − W̃)ᵀ) to that divergence: the
Kronecker-factored Gauss–Newton approximation (K-FAC, Martens & Grosse 2015, arXiv 1503.05671, §3). One forward
pass measures H and one backward pass measures G, so layers become comparable without trying each one end to end.
Gradients are of the *model's own* divergence, not of a task: labels are drawn from the model's softmax (causal
LMs), or a Gaussian probe of the embedding (encoders), which makes E[g gᵀ] the exact Gauss–Newton matrix at y.

That sum treats tokens as strangers, which they are to a causal LM's per-token divergence. An encoder pools them: an
error that all tokens of a sentence share adds up T times as large as one that is different in each, and counting it
like the others would make the last layers look up to twenty times cheaper than they measure. So for encoders x and g
are split into their mean over the sentence and the rest, and each part has its own pair of moments ("reduce" and
"expand" of Eschenhagen et al. 2023, arXiv 2311.00636).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from edgec.moments import SecondMoment, TableMoment, smoothed
from edgec.pooling import Pooling

Array = NDArray[Any]

MAX_CURVATURE = 4096
"""Widest output whose full curvature matrix is kept [features]; wider ones (vocabularies) keep the diagonal."""


_UNSHARED = 1.25
"""What layers of one width that read different inputs (an attention's output projection) add to `bytes_needed`."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What flowed through every layer.

    second_moments: layer → H, float32 [in, in]; for an embedding what each row counts [v], in shares of the whole: of
    the gradients' energy where there are gradients, of the tokens read where not. Layers that share an input share the
    array. curvatures: layer → G, float32 [out, out], or its diagonal [out]. tokens: how many were seen.
    mean_moments, mean_curvatures: of an encoder's linears, E[x̄ x̄ᵀ] of the mean x̄ over a sentence's tokens, and
    E[Σg Σgᵀ] of the sum over them. sentences: how many there were.
    """

    second_moments: Mapping[str, Array]
    curvatures: Mapping[str, Array]
    tokens: int
    mean_moments: Mapping[str, Array] = field(default_factory=dict)
    mean_curvatures: Mapping[str, Array] = field(default_factory=dict)
    sentences: int = 0
    _shared: dict[int, SecondMoment] = field(default_factory=dict, repr=False)

    def moment(self, name: str) -> SecondMoment | None:
        """The layer's H with its cached factorizations, one for all layers that share the array.

        A table's is a `TableMoment`, None where its curvature was not measured.
        """
        array = self.second_moments.get(name)
        if array is None:
            return None
        if array.ndim == 1:
            return self._table_moment(array, self.curvatures.get(name))
        if id(array) not in self._shared:
            self._shared.clear()  # layers come in order: the factorizations of one input at a time are enough
            self._shared[id(array)] = SecondMoment(array)
        return self._shared[id(array)]

    def _table_moment(self, frequencies: Array, curvature: Array | None) -> SecondMoment | None:
        if curvature is None or curvature.ndim != 2:
            return None
        if id(frequencies) not in self._shared:
            self._shared.clear()
            self._shared[id(frequencies)] = TableMoment(curvature, smoothed(frequencies))
        return self._shared[id(frequencies)]

    def divergence(self, name: str, error: Array) -> float | None:
        """½ tr(G E H Eᵀ): the end-to-end divergence that a weight error E [out, in], or a table's [v, d], adds alone.

        In nats per token, or 1 − cosine; None where the layer has no curvature.
        """
        g, h, e = self.curvatures.get(name), self.second_moments.get(name), error.astype(np.float32)
        if g is None or h is None:
            return None
        if h.ndim == 1:
            h = smoothed(h)
        g_mean, h_mean = self.mean_curvatures.get(name), self.mean_moments.get(name)
        if g_mean is None or h_mean is None:
            return 0.5 * _traced(g, e, h)
        # Σ g gᵀ of a sentence holds (Σ g)(Σ g)ᵀ ÷ its length; the mean length serves for all.
        apart = _traced(g - g_mean * np.float32(self.sentences / self.tokens), e, h - h_mean)
        return 0.5 * (_traced(g_mean, e, h_mean) + max(apart, 0.0))


def _traced(g: Array, e: Array, h: Array) -> float:
    """tr(G E H Eᵀ); G [out, out] or its diagonal [out], H [in, in]. For a table E [v, d]: tr(G Eᵀ diag(h) E), h [v]."""
    if h.ndim == 1:
        weighed = (e * h[:, None]).T
        return float((g * (weighed @ e)).sum() if g.ndim == 2 else g @ np.einsum("ij,ji->i", weighed, e))
    if g.ndim == 1:
        return float(g @ np.einsum("ij,ij->i", e @ h, e))
    return float((g * (e @ (h @ e.T))).sum())


class _Collector:
    """Hooks on one model, accumulating in float64 on the CPU; `mask` [B, T] of the batch under way hides padding."""

    def __init__(self, model: transformers.PreTrainedModel, layers: list[Layer], *, pooled: bool) -> None:
        self.mask: Tensor | None = None
        self.pooled = pooled
        self.moments: dict[str, Tensor] = {}
        self.curvatures: dict[str, Tensor] = {}
        self.mean_moments: dict[str, Tensor] = {}
        self.mean_curvatures: dict[str, Tensor] = {}
        self.energies: dict[str, Tensor] = {}
        self._ids: dict[str, Tensor] = {}
        self.shared: dict[str, str] = {}
        self._last: tuple[Tensor, str] | None = None
        self.handles = [model.get_submodule(layer.name).register_forward_hook(self._hook(layer)) for layer in layers]
        # Weights are frozen, so gradients start at the embeddings: from there they reach every layer's output.
        tables = {layer.name for layer in layers if layer.role == "embedding"}
        for table in {model.get_input_embeddings(), *(model.get_submodule(name) for name in tables)}:
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
            self._ids[layer.name] = x.reshape(-1)
            return
        if self._last is not None and self._last[0] is x:  # q, k and v read the same tensor: count it once
            self.shared[layer.name] = self._last[1]
            return
        self._last = (x, layer.name)
        rows = self._rows(x)
        self.moments[layer.name] = self.moments.get(layer.name, 0) + (rows.T @ rows).double()
        if (sums := self._sums(x)) is not None and self.mask is not None:
            means = (
                sums / self.mask.sum(1, keepdim=True).clamp(min=1).sqrt()
            )  # √T times the mean: one for each of T tokens
            self.mean_moments[layer.name] = self.mean_moments.get(layer.name, 0) + (means.T @ means).double()

    def _see_gradient(self, layer: Layer, gradient: Tensor) -> None:
        rows = self._rows(gradient)
        if layer.role == "embedding":
            # A rare token says more than a frequent one: its gradient has up to ten times the energy. Padding has none.
            squares = gradient.detach().double().pow(2).sum(-1).reshape(-1)
            energy = torch.bincount(self._ids[layer.name], weights=squares, minlength=layer.shape[0])
            self.energies[layer.name] = self.energies.get(layer.name, 0) + energy
        full = layer.shape[1] if layer.role == "embedding" else layer.shape[0]
        # A table that one row of positions reads for the whole batch gives a gradient per batch, not per sentence: too
        # few to tell directions apart, and rounding along what is left of them would be fitted to noise.
        scarce = layer.role == "embedding" and self.mask is not None and len(gradient) < len(self.mask)
        whole = full <= MAX_CURVATURE and not scarce
        add = (rows.T @ rows).double() if whole else (rows**2).sum(0).double()
        self.curvatures[layer.name] = self.curvatures.get(layer.name, 0) + add
        if layer.role != "embedding" and full <= MAX_CURVATURE and (sums := self._sums(gradient)) is not None:
            self.mean_curvatures[layer.name] = self.mean_curvatures.get(layer.name, 0) + (sums.T @ sums).double()

    def _rows(self, x: Tensor) -> Tensor:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        if self.mask is not None and flat.shape[0] == self.mask.numel():
            flat = flat[self.mask.reshape(-1)]
        return flat

    def _sums(self, x: Tensor) -> Tensor | None:
        """Sum over the tokens of every sentence [B, d]; None where sentences do not matter or x has other axes."""
        if not self.pooled or self.mask is None or x.shape[:-1] != self.mask.shape:
            return None
        return (x.detach().float() * self.mask.unsqueeze(-1)).sum(1)


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
    collector = _Collector(model, layers, pooled=curvature and pooling is not None)
    generator = torch.Generator().manual_seed(seed)
    try:
        for done, batch in enumerate(batches.items):
            collector.mask = batch["attention_mask"].bool()
            collector._last = None
            with torch.set_grad_enabled(curvature):
                output = _output(model, batch, pooling)
            if not torch.isfinite(output).all():
                first = next(
                    (name for name, total in collector.moments.items() if not torch.isfinite(total).all()), None
                )
                where = f"the input of layer {first!r}" if first else "its output"
                raise NumericsError(f"the model is not finite on the calibration text, from {where} on")
            if curvature:
                _divergence_probe(output, batch, pooling, generator).backward()
            if progress:
                progress(done + 1, len(batches.items))
    finally:
        collector.close()
    tokens, sentences = batches.tokens, sum(len(b["input_ids"]) for b in batches.items)

    def moments(totals: dict[str, Tensor]) -> dict[str, Array]:
        tables = totals.keys() & collector.energies.keys()
        found = {name: _finished(name, totals.pop(name), tokens) for name in list(totals)}
        for name in tables:
            if (energy := collector.energies[name]).sum() > 0:
                found[name] = _finished(name, energy / energy.sum(), 1)
        return found | {name: found[first] for name, first in collector.shared.items() if first in found}

    def curvatures(totals: dict[str, Tensor]) -> dict[str, Array]:
        # Per item of the metric: an encoder's loss is per sentence, a causal LM's per token.
        per = sentences if pooling is not None else tokens
        return {name: _finished(name, totals.pop(name), per) for name in list(totals)}

    return Statistics(
        moments(collector.moments),
        curvatures(collector.curvatures),
        tokens,
        moments(collector.mean_moments),
        curvatures(collector.mean_curvatures),
        sentences,
    )


def bytes_needed(layers: Sequence[Layer], *, pooled: bool) -> int:
    """About what `collect` holds at once beside the model, rather more than less: sums in float64, of every width once
    in each module. pooled: of an encoder, whose tokens and sentences have their own.
    """
    matrices = [layer for layer in layers if layer.role != "embedding"]
    widths = {(layer.name.rpartition(".")[0], layer.shape[1]) for layer in matrices}
    outputs = [layer.shape[0] for layer in matrices]
    numbers = sum(k * k for _, k in widths) + sum(n * n if n <= MAX_CURVATURE else n for n in outputs)
    return round(_UNSHARED * 8 * numbers * (2 if pooled else 1))


def _output(model: transformers.PreTrainedModel, batch: dict[str, Tensor], pooling: Pooling | None) -> Tensor:
    """Logits [B, T, V], or an encoder's embeddings [B, d]: normalised, because the loss is 1 − cosine in any case."""
    if pooling is not None:
        return embed_batch(model, batch, replace(pooling, normalize=True))
    logits: Tensor = model(**batch).logits
    return logits


def _divergence_probe(
    output: Tensor, batch: dict[str, Tensor], pooling: Pooling | None, generator: torch.Generator
) -> Tensor:
    """A scalar whose gradient g satisfies E[g gᵀ] = Gauss–Newton matrix of the divergence from the model itself."""
    if pooling is not None:
        return (output * torch.randn(output.shape, generator=generator)).sum()
    flat = output.reshape(-1, output.shape[-1])
    labels = torch.multinomial(flat.detach().softmax(-1), 1, generator=generator)[:, 0]
    weight = batch["attention_mask"].reshape(-1).to(output.dtype)
    return (nn.functional.cross_entropy(flat, labels, reduction="none") * weight).sum()


def _finished(name: str, total: Tensor, count: int) -> Array:
    mean = (total / count).numpy()
    if not np.isfinite(mean).all():
        raise NumericsError(f"layer {name!r}: its activations or gradients are not finite on the calibration text")
    return mean.astype(np.float32)
