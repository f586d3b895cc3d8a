"""Builds a Profile: spectra and entropies of weights, statistics of activations, and a score for every candidate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import transformers
from numpy.typing import NDArray

from edgec.calibration import Batches
from edgec.checkpoint import Checkpoint
from edgec.contraction import flops, parameters
from edgec.errors import EdgecError, NumericsError
from edgec.fit import DRAFT, FactorCache, Factors, contraction_of, fit
from edgec.modeling import Layer
from edgec.moments import SecondMoment
from edgec.pooling import Pooling
from edgec.profile.activations import Statistics, collect
from edgec.profile.entropy import cut, looks_random, random_entropy, singular_values, von_neumann
from edgec.profile.store import Profile
from edgec.quantize.formats import CoreFormat, LayerFormat
from edgec.records import Choice, LayerProfile, Spec

logger = logging.getLogger(__name__)

Candidates = Callable[[Layer, bool], Sequence[tuple[Spec, LayerFormat]]]
"""(layer, incompressible) → specs and formats worth scoring."""

Progress = Callable[[str, int, int], None]
"""(stage, done, total)."""

_WORTHWHILE = 0.98
"""A train must beat the low-rank form of its size by 2 % in functional error before its quantised forms are scored."""

_HOPELESS = 1.1
"""A train whose plain error is a tenth above the low-rank form's is not tried with the activations."""

Array = NDArray[Any]


def describe(layer: Layer, weight: Array) -> LayerProfile:
    """Spectrum and entropies of one weight; no activations needed."""
    singular = singular_values(weight)
    entropy = {"svd": von_neumann(singular)}
    random = {"svd": random_entropy(*layer.shape)}
    for modes in _interleaved(layer):
        name = f"{modes[0][0]}x{modes[0][1]}"
        unfolding = cut(weight, modes)
        entropy[name] = von_neumann(singular_values(unfolding))
        random[name] = random_entropy(*unfolding.shape)
    shapes = {"svd": layer.shape}
    incompressible = looks_random(entropy["svd"], *shapes["svd"]) if layer.role != "embedding" else False
    return LayerProfile(
        layer.name,
        layer.role,
        layer.shape,
        entropy,
        random,
        tuple(float(s) for s in singular),
        incompressible,
        layer.tied_to,
    )


def _interleaved(layer: Layer) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    if layer.role == "embedding" or max(layer.shape) > 8192:
        return []
    specs = contraction_suggestions(layer, 0.5)
    return [(s.modes[0], s.modes[1]) for s in specs if len(s.modes) == 2]


def contraction_suggestions(layer: Layer, ratio: float) -> list[Spec]:
    """The tensor trains that `tensor_train` would try at a parameter ratio."""
    from edgec.decompose import get

    return list(get("tensor_train").suggest(*layer.shape, ratio, 32))


def build_profile(
    model: transformers.PreTrainedModel,
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    batches: Batches,
    *,
    pooling: Pooling | None,
    candidates: Candidates,
    cache: FactorCache | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Measure the dense model on the batches and score every candidate of every layer. Errors name the layer."""
    tell = progress or (lambda stage, done, total: None)
    statistics = collect(
        model, list(layers), batches, pooling=pooling, progress=lambda done, total: tell("calibrating", done, total)
    )
    profiles = []
    for done, layer in enumerate(layers):
        tell("scoring", done, len(layers))
        weight = model.get_parameter(f"{layer.name}.weight").detach().float().numpy()
        try:
            described = describe(layer, weight)
            scored = Scorer(layer, weight, statistics, cache).score(candidates(layer, described.incompressible))
        except EdgecError as error:
            raise type(error)(f"layer {layer.name!r}: {error}") from error
        profiles.append(replace(described, candidates=tuple(scored)))
    tell("scoring", len(layers), len(layers))
    return Profile(checkpoint.fingerprint, batches.origin, statistics.tokens, tuple(profiles), statistics)


class Scorer:
    """Fits candidates of one layer and predicts what each does to the output of the layer and of the model."""

    def __init__(self, layer: Layer, weight: Array, statistics: Statistics, cache: FactorCache | None = None) -> None:
        if not np.isfinite(weight).all():
            raise NumericsError("the weight holds NaN or Inf")
        self.layer, self.weight, self.statistics, self.cache = layer, weight, statistics, cache
        h = statistics.second_moments.get(layer.name)
        self.frequencies = h if h is not None and h.ndim == 1 else None
        self.moment = statistics.moment(layer.name)
        self.whole = self._squared(weight)

    def score(self, candidates: Sequence[tuple[Spec, LayerFormat]]) -> list[Choice]:
        """One Choice per candidate, in order.

        Trains that do not beat the low-rank form of their size are left out, and so, with a warning, are factored
        forms whose decomposition does not converge: the layer then stays dense.
        """
        kept: dict[tuple[tuple[int, int], ...], bool] = {}
        choices = []
        for spec, fmt in candidates:
            try:
                if spec.kind == "tensor_train":
                    if spec.modes not in kept:
                        kept[spec.modes] = self._worthwhile(spec)
                    if not kept[spec.modes]:
                        continue
                choices.append(self.choice(spec, fmt))
            except NumericsError as error:
                if spec.kind == "dense":
                    raise
                logger.warning("layer %r: %s in %s is left out: %s", self.layer.name, spec, fmt, error)
        return choices

    def choice(self, spec: Spec, fmt: LayerFormat) -> Choice:
        """Fit one candidate, as a draft, and score it."""
        factors = self.draft(spec, fmt)
        difference = self.weight - factors.dense()
        error = float(np.sqrt(max(self._squared(difference), 0.0) / self.whole)) if self.whole > 0 else 0.0
        return Choice(
            layer=self.layer.name,
            role=self.layer.role,
            shape=self.layer.shape,
            spec=spec,
            format=str(fmt),
            bytes=factors.stored_bytes,
            flops=flops(factors.contraction),
            error=error,
            loss=self.statistics.divergence(self.layer.name, difference),
        )

    def draft(self, spec: Spec, fmt: LayerFormat) -> Factors:
        key = (self.layer.name, spec, fmt, DRAFT)
        found = self.cache.get(key) if self.cache else None
        if found is None:
            found = fit(self.weight, spec, fmt, role=self.layer.role, moment=self.moment, quantizer=DRAFT)
            if self.cache:
                self.cache.put(key, found)
        return found

    def _worthwhile(self, spec: Spec) -> bool:
        """Does this train, unquantised, beat the low-rank form with as many parameters?

        Asked of the weight alone first: whitening a train whose state is wide takes seconds, and does not save one
        that is far behind before it.
        """
        size = parameters(contraction_of(spec, self.layer.shape, self.layer.role))
        low_rank = Spec("svd", (min(max(1, size // sum(self.layer.shape)), min(self.layer.shape)),))

        def error(candidate: Spec, moment: SecondMoment | None) -> float:
            difference = self.weight - fit(self.weight, candidate, CoreFormat(32), moment=moment).dense()
            squared = self._squared(difference) if moment is not None else float((difference**2).sum())
            return float(np.sqrt(max(squared, 0.0)))

        if not error(spec, None) < _HOPELESS * error(low_rank, None):
            return False
        return error(spec, self.moment) < _WORTHWHILE * error(low_rank, self.moment)

    def _squared(self, difference: Array) -> float:
        """Expected squared output error of a weight error [out, in] (table error [v, d])."""
        if self.frequencies is not None:
            return float(self.frequencies @ (difference.astype(np.float64) ** 2).sum(1))
        if self.moment is None:
            return float((difference.astype(np.float64) ** 2).sum())
        return self.moment.squared(difference)
