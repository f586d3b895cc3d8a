"""Which (spec, format) pairs are worth trying for a layer on a target. Costs only; no numbers are looked at here."""

from __future__ import annotations

from collections.abc import Sequence

from edgec import decompose, limits
from edgec.contraction import Gather, core_shapes, quantisable, walk, widest
from edgec.fit import contraction_of, core_formats
from edgec.quantize.formats import BACKBONE, CoreFormat, LayerFormat
from edgec.quantize.ggml_formats import GgmlFormat
from edgec.records import Spec, Target

RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Parameter ratios tried for factored forms: below 0.3 nothing survives without healing, above 0.9 nothing is saved."""

TABLE_RATIOS = (1 / 2, 2 / 3, 5 / 6, 1.0)
"""Shares of its columns that a factored table keeps: below a half, too little is left of the tokens that are rare."""

TABLE_FORMATS = ("int4-b32", "int2-b32+int4-b32")
"""Formats of a factored table, of one band and of two. At 8 bits, fewer columns cost more than fewer bits would."""

_WHOLE = {"residual": (1.12, 1.22, 1.34), "disentangled": (1.0,)}
"""Kinds that keep a whole matrix, and the parameter ratios tried for them: 1 is that matrix alone."""

FALLBACK = CoreFormat(16)
"""What a layer that nothing else fits is kept as: fp16 in the file, cast to fp32 inside the graph."""


def candidates(
    targets: Sequence[Target], role: str, shape: tuple[int, int], *, incompressible: bool = False, tied: bool = False
) -> list[tuple[Spec, LayerFormat]]:
    """Everything that at least one of the targets can execute fast for the layer, dense first; fp16 where nothing is.

    tied: the layer is the head of a tied pair.
    """
    found: list[tuple[Spec, LayerFormat]] = [(Spec("dense"), FALLBACK)]
    for target in targets:
        dense = target.embedding_formats if role == "embedding" or tied else target.dense_formats
        found += [(Spec("dense"), LayerFormat.parse(name)) for name in dense]
        if role == "embedding":
            found += _factored_tables(shape, target.rank_multiple)
        if role == "embedding" or incompressible:
            continue
        for kind in decompose.searched():
            allowed = target.formats_of(kind)
            for ratio in _WHOLE.get(kind, RATIOS):
                for spec in decompose.get(kind).suggest(*shape, ratio, target.rank_multiple) if allowed else ():
                    if spec.kind != "dense":
                        found += [(spec, LayerFormat.parse(name)) for name in allowed]
    usable = [
        c
        for c in dict.fromkeys(found)
        if native(c[1], shape) and any(executable(t, role, shape, *c, tied=tied) for t in targets)
    ]
    # Floats run no low-bit kernel: they are for layers that nothing else fits on one of the targets.
    floats = any(not any(c[1].quantised and executable(t, role, shape, *c, tied=tied) for c in usable) for t in targets)
    return usable if floats else [c for c in usable if c[1].quantised]


def executable(
    target: Target, role: str, shape: tuple[int, int], spec: Spec, fmt: LayerFormat, *, tied: bool = False
) -> bool:
    """Can the target run this choice on its fast kernels, or, for floats, at all?"""
    if fmt.simulated:
        return False
    if not fmt.quantised:
        return True
    if role == "embedding" and spec.kind != "dense":
        return bool(target.factored_formats) and _factored_table_executable(target, shape, spec, fmt)
    if role == "embedding" or (tied and spec.kind == "dense"):
        multiplied = role == "embedding" or str(fmt) in target.dense_formats
        own = fmt.of("weight")
        fits = isinstance(own, GgmlFormat) or shape[1] % own.block == 0
        return str(fmt) in target.embedding_formats and multiplied and fits
    if str(fmt) not in target.formats_of(spec.kind):
        return False
    if tied and spec.kind == "residual" and target.must_beat:
        return False  # an adapter corrects tensors of the file, and a tied head is none
    contraction = contraction_of(spec, shape, role)
    if widest(contraction) > limits.MAX_DIMENSION:
        return False  # a train of a large matrix: gigabytes of activations, which the factored runtime refuses
    inner = {name: s[-1] for name, s in core_shapes(contraction).items() if name in quantisable(contraction)}
    return all(_fits(target, fmt.of(core), k) for core, k in inner.items()) and all(
        rank % target.rank_multiple == 0 for rank in spec.ranks
    )


def _fits(target: Target, fmt: CoreFormat, k: int) -> bool:
    """Does an inner dimension suit a core's format? A ggml type has its fallback for rows that do not divide."""
    return (isinstance(fmt, GgmlFormat) or k >= fmt.block) and k % target.k_multiple == 0


def native(fmt: LayerFormat, shape: tuple[int, int]) -> bool:
    """Is no ggml type in it replaced by its fallback? The fallbacks are offered under their own names."""
    own = fmt.of(BACKBONE)
    return not isinstance(own, GgmlFormat) or own.divides(shape[1])


def _factored_tables(shape: tuple[int, int], multiple: int) -> list[tuple[Spec, LayerFormat]]:
    found = []
    for kind in decompose.lookups():
        for ratio in TABLE_RATIOS:
            for spec in decompose.get(kind).suggest(*shape, ratio, multiple):
                single = len(spec.ranks) == 1
                found += [(spec, LayerFormat.parse(n)) for n in TABLE_FORMATS if ("+" in n) != single]
    return found


def _factored_table_executable(target: Target, shape: tuple[int, int], spec: Spec, fmt: LayerFormat) -> bool:
    """Its tables must be readable by the lookup kernel, its mixers by the matrix product's."""
    contraction = contraction_of(spec, shape, "embedding")
    shapes, formats = core_shapes(contraction), core_formats(contraction, fmt)
    tables = {step.core for step in walk(contraction.steps) if isinstance(step, Gather)}
    for core, own in formats.items():
        k = shapes[core][-1]
        if core in tables and (str(own) not in target.embedding_formats or k % own.block):
            return False
        if core not in tables and (str(own) not in target.dense_formats or k % target.k_multiple or k < own.block):
            return False
    return all(rank % target.rank_multiple == 0 for rank in spec.ranks)


def uniform(shape: tuple[int, int], ratio: float, multiple: int) -> Spec:
    """The low-rank spec of a layer at one parameter ratio for all layers; dense where the rank would save nothing."""
    specs = decompose.get("svd").suggest(*shape, ratio, multiple) if ratio < 1 else []
    return specs[0] if specs else Spec("dense")
