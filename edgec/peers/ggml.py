"""llama.cpp's quantization types, each on every layer: what `llama-quantize --pure` makes with an importance matrix.

Its mixes (Q4_K_M) give layers more bits by their names and were turned down, since edgec's peers are uniform. The
quantizers themselves are in `edgec.quantize.ggml`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from edgec.contraction import Contraction, MatMul
from edgec.errors import RuntimeUnavailableError
from edgec.fit import Factors
from edgec.moments import SecondMoment
from edgec.peers import Peer, Replacement
from edgec.quantize.ggml import Ggml, importance_of, library
from edgec.quantize.ggml_formats import real_type
from edgec.records import Target

PLUGIN = True
FAMILY = "llama.cpp"

TYPES = (
    "Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_NL", "IQ4_XS", "Q4_0", "Q3_K", "IQ3_S", "IQ3_XXS",
    "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS",
)  # fmt: skip
"""Types that are tried, from most bits to fewest."""

TYPES_BELOW_TWO = ("IQ1_M", "IQ1_S")
"""Tried for budgets below 2 bits only: preparing their lattice takes ggml a minute."""

_NEEDS_ACTIVATIONS = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"})


def peers(target: Target, bits: Sequence[float]) -> list[Peer]:
    """One per type, whatever the target: llama.cpp is a runtime of its own, and a user may choose it instead."""
    ggml = library()
    low = TYPES_BELOW_TWO if any(b < 2 for b in bits) else ()
    return [_peer(ggml, name) for name in (*TYPES, *low)]


def _peer(ggml: Ggml, wanted: str) -> Peer:
    def make(weight: NDArray[Any], moment: SecondMoment | None) -> Replacement:
        out, in_ = int(weight.shape[0]), int(weight.shape[1])
        name = real_type(wanted, in_)
        if moment is None and name in _NEEDS_ACTIVATIONS:
            raise RuntimeUnavailableError(f"{name} needs activations, and this layer has none")
        codes = ggml.quantize(weight, name, None if moment is None else importance_of(moment))
        values = ggml.dequantize(codes, name, (out, in_))
        factors = Factors(Contraction(out, in_, (MatMul("weight", out, in_),)), {"weight": values})
        form = name if name == wanted else f"{wanted}→{name}"
        return Replacement(factors, int(codes.size), form, healable=False)

    return Peer(FAMILY, wanted, make, FAMILY)
