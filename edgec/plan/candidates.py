"""Which (spec, format) pairs are worth trying for a layer on a target. Costs only; no numbers are looked at here."""

from __future__ import annotations

from collections.abc import Sequence

from edgec import decompose
from edgec.contraction import core_shapes, quantisable
from edgec.fit import contraction_of
from edgec.quantize.formats import CoreFormat, LayerFormat
from edgec.records import Spec, Target

RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Parameter ratios tried for factored forms: below 0.3 nothing survives without healing, above 0.9 nothing is saved."""

RESIDUAL_RATIOS = (1.12, 1.22, 1.34)
"""Parameter ratios tried for a backbone with a correction: 1 is the backbone. `residual` suggests small ranks only."""

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
        if role == "embedding" or incompressible:
            continue
        for kind in decompose.searched():
            allowed = target.formats_of(kind)
            for ratio in RESIDUAL_RATIOS if kind == "residual" else RATIOS:
                for spec in decompose.get(kind).suggest(*shape, ratio, target.rank_multiple) if allowed else ():
                    if spec.kind != "dense":
                        found += [(spec, LayerFormat.parse(name)) for name in allowed]
    usable = [c for c in dict.fromkeys(found) if any(executable(t, role, shape, *c, tied=tied) for t in targets)]
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
    if role == "embedding" or (tied and spec.kind == "dense"):
        return str(fmt) in target.embedding_formats and shape[1] % fmt.of("weight").block == 0
    if str(fmt) not in target.formats_of(spec.kind):
        return False
    contraction = contraction_of(spec, shape, role)
    inner = {name: s[-1] for name, s in core_shapes(contraction).items() if name in quantisable(contraction)}
    return all(k >= fmt.of(core).block and k % target.k_multiple == 0 for core, k in inner.items()) and all(
        rank % target.rank_multiple == 0 for rank in spec.ranks
    )


def uniform(shape: tuple[int, int], ratio: float, multiple: int) -> Spec:
    """The low-rank spec of a layer at one parameter ratio for all layers; dense where the rank would save nothing."""
    specs = decompose.get("svd").suggest(*shape, ratio, multiple) if ratio < 1 else []
    return specs[0] if specs else Spec("dense")
