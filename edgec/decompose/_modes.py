"""Modes in split order, as the forms read them that give every mode a factor of its own (Tucker, CP)."""

from __future__ import annotations

import math

from edgec.errors import PlanError
from edgec.records import Spec

MOST = 2
"""Output modes, and input modes, that one form may have [count]: more would not fit the axes that steps have."""


def split(spec: Spec, out: int, in_: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Output modes and input modes of a spec; the plain matrix without any. Raises PlanError for another order.

    A mode (1, 1) belongs to the side that lacks it: outputs come first, inputs last.
    """
    if not spec.modes:
        return (out,), (in_,)
    products = math.prod(o for o, _ in spec.modes), math.prod(i for _, i in spec.modes)
    if products != (out, in_) or min(min(mode) for mode in spec.modes) < 1:
        raise PlanError(f"modes of {spec} multiply to {products[0]}x{products[1]}; the layer is {out}x{in_}")
    count = len(spec.modes)
    for cut in range(max(1, count - MOST), min(MOST, count - 1) + 1):
        left, right = spec.modes[:cut], spec.modes[cut:]
        if all(i == 1 for _, i in left) and all(o == 1 for o, _ in right):
            return tuple(o for o, _ in left), tuple(i for _, i in right)
    raise PlanError(
        f"modes of {spec} are not in split order: one or two output modes (o, 1), then one or two input modes (1, i)"
    )


def balanced(n: int, multiple: int) -> tuple[int, int]:
    """n = a·b with b a multiple of `multiple` and a ≤ b as large as possible; a = 1 where n does not factor so."""
    best = max((a for a in range(1, math.isqrt(n) + 1) if n % a == 0 and (n // a) % multiple == 0), default=1)
    return best, n // best
