"""One layer, one choice: factorize the weight, quantise every core, keep the result as `Factors`.

`decompose` knows nothing of quantization and `quantize` nothing of layers; this is where they meet, below every
room that needs a fitted layer (profile to score candidates, compress to apply a plan).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec import decompose
from edgec.contraction import Contraction, Gather, core_shapes, dense, quantisable, walk
from edgec.errors import NumericsError, PlanError
from edgec.moments import SecondMoment, TableMoment
from edgec.quantize import descent, ggml
from edgec.quantize.formats import BACKBONE, CoreFormat, LayerFormat, PairFormat, QuantizedTensor, storable
from edgec.quantize.ggml_formats import GgmlFormat
from edgec.records import Spec

Core = NDArray[Any] | QuantizedTensor
Quantizer = Callable[[NDArray[Any], CoreFormat, SecondMoment | None], QuantizedTensor]

DRAFT: Quantizer = partial(descent.quantize, sweeps=1)
"""What candidates are scored and plans are searched with; plans that ship are fitted anew (`pipeline.refit`). Drafts of
GPTQ alone were turned down: factored cores have less to gain than whole ones, so the search took too many of them, and
1 − cosine of all-MiniLM-L6-v2 came out 8 % larger at 2.5 bits and 15 % at 1.5."""

_GPTQ_TABLE = 1 << 26
"""Largest dense table that is quantised by GPTQ [values]; the time grows with values × width. On MiniLM's (12 million
values) it takes a third off the predicted loss of rounding to nearest, at 4 bits and at 2."""

_MIXER = CoreFormat(8, 32)
"""Format of the small matrices of a quantised factored table: every row passes through them, and they weigh nothing."""


def stored_arrays(core: Core) -> Iterator[NDArray[Any]]:
    """The numbers that a core is: floats, or codes, scales and zero points."""
    if not isinstance(core, QuantizedTensor):
        yield core
        return
    yield from (core.codes, core.scales)
    if core.zero_points is not None:
        yield core.zero_points


@dataclass(frozen=True, eq=False)
class Factors:
    """A fitted layer: its contraction and every core, as stored (floats in their dtype, or quantised).

    input_rms: root mean square of the input's channels, float32 [in], where activations were measured: what a runtime
    that quantises activations balances them by. None for tables.
    """

    contraction: Contraction
    cores: Mapping[str, Core]
    input_rms: NDArray[np.float32] | None = None

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of all cores as they ship."""
        return sum(c.stored_bytes if isinstance(c, QuantizedTensor) else c.nbytes for c in self.cores.values())

    def values(self) -> dict[str, NDArray[np.float32]]:
        """Every core as float32 numbers, as a runtime will see them."""
        return {
            name: core.dequantize() if isinstance(core, QuantizedTensor) else core.astype(np.float32)
            for name, core in self.cores.items()
        }

    def dense(self) -> NDArray[np.float32]:
        """The matrix [out, in] (or table [v, n]) that the factors stand for: for scoring, never for running."""
        return np.asarray(dense(self.contraction, self.values()), dtype=np.float32)


def contraction_of(spec: Spec, shape: tuple[int, int], role: str) -> Contraction:
    """The contraction of a spec for a layer of `shape` (out, in); of a table (v, n) when the role is "embedding"."""
    if spec.kind not in (known := decompose.kinds_of(role)):
        raise PlanError(f"a layer of role {role!r} can be {', '.join(known)}; got {spec}")
    if role == "embedding" and spec.kind == "dense":
        if spec.ranks or spec.modes:
            raise PlanError(f"a dense table has neither ranks nor modes; got {spec}")
        return Contraction(shape[1], shape[0], (Gather("weight", *shape),))
    return decompose.get(spec.kind).contraction(spec, *shape)


def stored_bytes(spec: Spec, shape: tuple[int, int], role: str, fmt: LayerFormat) -> int:
    """Bytes that a choice will store, known before anything is computed. Raises PlanError like `fit`."""
    contraction = contraction_of(spec, shape, role)
    _check_pair(spec, contraction, fmt)
    formats = core_formats(contraction, fmt)
    return sum(formats[name].stored_bytes(s) for name, s in core_shapes(contraction).items())


def fit(
    weight: NDArray[Any],
    spec: Spec,
    fmt: LayerFormat,
    *,
    role: str = "linear",
    moment: SecondMoment | None = None,
    quantizer: Quantizer = descent.quantize,
) -> Factors:
    """weight [out, in] (table [v, n] for an embedding) → Factors.

    With a moment, the factorization is whitened by it and cores are quantised for the least error of the output; else
    plain and rounded to nearest. A table's is a `TableMoment`: its curvature does for a row what a layer's input
    moment does for a row of a matrix. quantizer: of cores in `CoreFormat`s; ggml's own types have theirs. Raises
    NumericsError when the weight is not finite, PlanError for a pair of formats where no core is a backbone.
    """
    if not np.isfinite(weight).all():
        raise NumericsError("the weight holds NaN or Inf")
    contraction = contraction_of(spec, (int(weight.shape[0]), int(weight.shape[1])), role)
    _check_pair(spec, contraction, fmt)
    formats = core_formats(contraction, fmt)
    cores: dict[str, Core] = {}

    def finish(name: str, core: NDArray[Any], core_moment: SecondMoment | None) -> NDArray[Any]:
        own = formats[name]
        if own.quantised:
            quantised: QuantizedTensor
            if isinstance(own, GgmlFormat):
                quantised = ggml.quantize(core, own, core_moment)
            else:
                quantised = quantizer(core, own, core_moment)
            cores[name] = quantised
            return quantised.dequantize()
        stored = np.ascontiguousarray(storable(core) if own.bits == 16 else core.astype(np.float32))
        cores[name] = stored
        return stored

    if role == "embedding" and spec.kind == "dense":
        finish("weight", weight, moment if weight.size <= _GPTQ_TABLE else None)
    else:
        try:
            decompose.get(spec.kind).factorize(weight, spec, moment, finish)
        except np.linalg.LinAlgError as error:
            raise NumericsError(f"{spec.kind}: {error}; give the layer another form") from error
    rms = None if moment is None or isinstance(moment, TableMoment) else np.sqrt(moment.diagonal)
    return Factors(contraction, cores, rms)


def core_formats(contraction: Contraction, fmt: LayerFormat) -> dict[str, CoreFormat]:
    """How each core of a layer is stored.

    In a quantised layer, cores that no low-bit kernel takes (diagonal scales, block rotations) are kept as fp16, and
    the mixers of a factored table at 8 bits.
    """
    able = quantisable(contraction)
    tables = {step.core for step in walk(contraction.steps) if isinstance(step, Gather)}

    def own(name: str) -> CoreFormat:
        if name not in able and fmt.quantised:
            return CoreFormat(16)
        if tables and name not in tables and fmt.of(name).quantised:
            return _MIXER
        return fmt.of(name)

    return {name: own(name) for name in core_shapes(contraction)}


def _check_pair(spec: Spec, contraction: Contraction, fmt: LayerFormat) -> None:
    if isinstance(fmt, PairFormat) and BACKBONE not in core_shapes(contraction):
        raise PlanError(f"{spec} has no core called {BACKBONE!r}; give it one format instead of {fmt}")


class FactorCache:
    """Fitted layers by any key: one run scores, tries and ships the same ones.

    The least recently used are dropped beyond `cap_bytes` of cores in memory.
    """

    def __init__(self, cap_bytes: int = 1 << 30) -> None:
        self.cap_bytes = cap_bytes
        self._kept: OrderedDict[Any, Factors] = OrderedDict()
        self._bytes = 0

    def get(self, key: Any) -> Factors | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Any, factors: Factors) -> None:
        if (replaced := self._kept.pop(key, None)) is not None:
            self._bytes -= _resident(replaced)
        self._kept[key] = factors
        self._bytes += _resident(factors)
        while self._bytes > self.cap_bytes and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= _resident(dropped)


def _resident(factors: Factors) -> int:
    return sum(
        c.codes.nbytes + c.scales.nbytes if isinstance(c, QuantizedTensor) else c.nbytes for c in factors.cores.values()
    )
