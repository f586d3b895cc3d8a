"""A plan becomes factors, and factors become modules of a transformers model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from torch import nn

from edgec.compress.modules import Factored, FactoredEmbedding, FactoredLinear
from edgec.contraction import Contraction, MatMul
from edgec.errors import EdgecError
from edgec.fit import FactorCache, Factors, Quantizer, fit
from edgec.modeling import Layer
from edgec.moments import SecondMoment
from edgec.quantize import descent
from edgec.quantize.formats import LayerFormat
from edgec.records import Choice

Weights = Callable[[str], NDArray[Any]]
"""Layer name → weight [out, in] (table [v, d]), read when it is needed and dropped after."""


def fit_choices(
    choices: Sequence[Choice],
    weights: Weights,
    layers: Sequence[Layer],
    moments: Callable[[str], SecondMoment | None],
    cache: FactorCache | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    quantizer: Quantizer = descent.quantize,
) -> dict[str, Factors]:
    """Factors of every chosen layer. A tied head that is dense in its table's format shares the table's cores.

    moments: layer name → second moment of its input, or None to fit it plainly. Errors name the layer.
    """
    tables = {layer.name: layer.tied_to for layer in layers}
    by_name = {choice.layer: choice for choice in choices}
    fitted: dict[str, Factors] = {}
    for done, choice in enumerate(choices):
        fmt = LayerFormat.parse(choice.format)
        key = (choice.layer, choice.spec, fmt, quantizer)
        found = cache.get(key) if cache else None
        if found is None:
            try:
                weight, moment = weights(choice.layer), moments(choice.layer)
                found = fit(weight, choice.spec, fmt, role=choice.role, moment=moment, quantizer=quantizer)
            except EdgecError as error:
                raise type(error)(f"layer {choice.layer!r}: {error}") from error
            if cache:
                cache.put(key, found)
        fitted[choice.layer] = found
        if progress:
            progress(done + 1, len(choices))
    for name, table in tables.items():
        if table and name in fitted and table in fitted and _shares(by_name[name], by_name[table]):
            fitted[name], fitted[table] = _shared(fitted[name], fitted[table])
    return fitted


def _shares(head: Choice, table: Choice) -> bool:
    return head.spec.kind == table.spec.kind == "dense" and head.format == table.format


def _shared(head: Factors, table: Factors) -> tuple[Factors, Factors]:
    """Both read the head's numbers: they were quantised with the head's activations, and a lookup minds errors less."""
    step = head.contraction.steps[0]
    assert isinstance(step, MatMul)
    cores = {"weight": head.cores["weight"]}
    return Factors(Contraction(step.n, step.k, (MatMul("weight", step.n, step.k),)), cores), Factors(
        table.contraction, cores
    )


def apply_factors(model: nn.Module, factors: Mapping[str, Factors]) -> None:
    """Put factored modules in place of the dense ones, in `model` itself; biases move along.

    model: a transformers model, or one block of it with names as the block has them.
    """
    for name, fitted in factors.items():
        dense = model.get_submodule(name)
        kind: type[Factored] = FactoredEmbedding if isinstance(dense, nn.Embedding) else FactoredLinear
        module = kind.from_factors(fitted, getattr(dense, "bias", None))
        scale = getattr(dense, "embed_scale", None)  # Gemma multiplies inside its embedding module
        if scale is not None:
            module.register_forward_hook(lambda _module, _inputs, output, scale=scale: output * scale.to(output.dtype))
        model.set_submodule(name, module)
