"""A local rotation of the inputs before quantization or truncation: W = W' R, R block-diagonal and orthogonal.

x is cut into g groups of b; every group is turned by the same b × b matrix Q, so R = 1_g ⊗ Q:

    Reshape (g, b) → MatMul(rotation [b, b]) → Reshape → the form on W'        dense, or low rank with one rank

Two rotations are tried, and the one that loses less once everything is quantised is kept:

- *Hadamard* (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456; the orthonormal DCT-II where b is no power of two):
  spreads what is large in one channel over all, so that a block's one scale fits all of its numbers.
- *learned*: the eigenbasis of the mean block of the input moment, the disentangler (Aizpurua et al. 2024) that leaves
  the inputs of a group uncorrelated, and gathers the error where inputs are small.

What this can and cannot do: singular values do not change under a rotation of the inputs, so a low-rank form of a
given rank loses exactly as much after any R as before. A rotation moves only what depends on the basis: the rounding of
numbers. Hence the rotation is not alternated with the truncation (Procrustes): there is nothing to gain there.

Measured on 18 linears of all-MiniLM-L6-v2 (functional error on held-out text, GPTQ): int4-b32 0.0457 → 0.0421; int2-b64
0.1961 → 0.187 with the rotation in int8 ("int2-b64+int8-b32"), but 0.206 with the rotation itself in int2. The layers
with outliers gain most, up to a fifth.

One rotation for all groups was chosen over one per group (a BlockMatMul): g·b² fp16 numbers are 30 % of the bytes of
a 384 × 384 matrix in int4 at b = 32, one b × b core 0.7 %; and a learned one per group measured worse than none
(0.0469). The shared one is quantised like any other core and W' fitted to what it became: a rotation that is only
nearly orthogonal is still exactly undone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dct
from scipy.linalg import hadamard

from edgec.contraction import Contraction, MatMul, Reshape
from edgec.decompose import Finish, svd
from edgec.decompose._lapack import eigenpairs
from edgec.errors import NumericsError, PlanError
from edgec.moments import SecondMoment
from edgec.records import Spec

PLUGIN = True

SEARCHED = True

WIDTH = 32
"""Inputs per group [count]: the smallest block of the 4-bit kernels. Groups of 128 measured no better in int4 (0.0447
for 0.0449) and 1.5 % better in int2, for 16 times the rotation.
"""

BACKBONE = "backbone"
"""The core that holds W', under the name that a format may give a number format of its own."""

_SINGULAR = 1e-2
"""Least singular value of a rotation as it was stored; below it, dividing by it would blow W' up."""

Array = NDArray[Any]


def contraction(spec: Spec, out: int, in_: int) -> Contraction:
    """The rotation, then MatMul(backbone [out, in]) or the low-rank form's steps (core2 [r, in], core1 [out, r])."""
    g, b = _check(spec, out, in_)
    rotation = (Reshape((g, b)), MatMul("rotation", b, b), Reshape((in_,)))
    if not spec.ranks:
        return Contraction(out, in_, (*rotation, MatMul(BACKBONE, out, in_)))
    return Contraction(out, in_, (*rotation, *svd.contraction(Spec("svd", spec.ranks), out, in_).steps))


def _check(spec: Spec, out: int, in_: int) -> tuple[int, int]:
    """Groups and their width. Raises PlanError."""
    products = math.prod(o for o, _ in spec.modes), math.prod(i for _, i in spec.modes)
    if products != (out, in_) or min((min(mode) for mode in spec.modes), default=1) < 1:
        raise PlanError(f"modes of {spec} multiply to {products[0]}x{products[1]}; the layer is {out}x{in_}")
    if len(spec.modes) != 3 or spec.modes[0] != (out, 1):
        raise PlanError(f"a disentangled form has the modes {out}x1 1xG 1xB (G groups of B inputs); got {spec}")
    if len(spec.ranks) > 1:
        raise PlanError(f"a disentangled form has one rank, or none where W' stays whole; got {spec}")
    if spec.ranks and not 1 <= spec.ranks[0] <= min(out, in_):
        raise PlanError(f"rank {spec.ranks[0]} of {spec} is outside 1 … {min(out, in_)}, the cut's maximum")
    return spec.modes[1][1], spec.modes[2][1]


def factorize(weight: Array, spec: Spec, moment: SecondMoment | None, finish: Finish) -> None:
    """weight [out, in] → rotation [b, b], then W' as one core or two, fitted to the rotation as it was stored.

    Raises NumericsError when the weight is not finite.
    """
    if not np.isfinite(weight).all():
        raise NumericsError("the weight holds NaN or Inf")
    g, b = _check(spec, *weight.shape)
    w = np.asarray(weight, dtype=np.float64)
    rotations = [spread(b)] if moment is None else [spread(b), learned(moment, b)]
    tried = []
    for number, rotation in enumerate(rotations):
        error = _fitted(w, g, rotation, spec, moment, finish)
        if error is not None:
            tried.append((error, number))
    if not tried:
        raise NumericsError("the rotation is not invertible once it is quantised; give it a finer format")
    best = min(tried)[1]
    if best != len(rotations) - 1:  # the last call of a name wins: back to the better one
        _fitted(w, g, rotations[best], spec, moment, finish)


def _fitted(
    w: Array, g: int, rotation: Array, spec: Spec, moment: SecondMoment | None, finish: Finish
) -> float | None:
    """Finish all cores behind this rotation; tr(E H Eᵀ) of the result, None where the stored one cannot be undone."""
    stored = np.asarray(finish("rotation", rotation, None), dtype=np.float64)
    if np.linalg.svd(stored, compute_uv=False)[-1] < _SINGULAR:
        return None
    turned_w = _each(w, np.linalg.inv(stored).T, g)
    turned = moment and SecondMoment(_each(_each(moment.matrix, stored, g).T, stored, g))
    cores: dict[str, Array] = {}

    def keep(name: str, core: Array, core_moment: SecondMoment | None) -> Array:
        cores[name] = finish(name, core, core_moment)
        return cores[name]

    if spec.ranks:
        svd.factorize(turned_w, Spec("svd", spec.ranks), turned, keep)
        difference = turned_w - cores["core1"].astype(np.float64) @ cores["core2"]
    else:
        difference = turned_w - keep(BACKBONE, turned_w, turned)
    return float((difference**2).sum()) if turned is None else turned.squared(difference)


def _each(rows: Array, matrix: Array, g: int) -> Array:
    """rows [n, g·b], matrix [b, b] applied to every group: row (1_g ⊗ matrix)ᵀ."""
    return np.asarray((rows.reshape(len(rows), g, -1) @ matrix.T).reshape(rows.shape))


def spread(b: int) -> Array:
    """The orthonormal Hadamard matrix [b, b], or DCT-II where b is no power of two."""
    if b & (b - 1) == 0:
        return np.asarray(hadamard(b) / math.sqrt(b))
    return np.asarray(dct(np.eye(b), axis=0, norm="ortho"))


def learned(moment: SecondMoment, b: int) -> Array:
    """Rows: eigenvectors of the mean block [b, b] of the moment, largest first, their largest entry positive."""
    blocks = moment.matrix.reshape(moment.width // b, b, moment.width // b, b)
    vectors = eigenpairs(np.einsum("gsgt->st", blocks), lean=True)[1][:, ::-1].T
    largest = vectors[np.arange(b), np.abs(vectors).argmax(1)]
    return np.asarray(vectors * np.where(largest < 0, -1.0, 1.0)[:, None])


def suggest(out: int, in_: int, ratio: float, multiple: int) -> list[Spec]:
    """W' whole, at a ratio of 1 or more: it costs what the dense form costs, and b² for the rotation.

    None below: in front of a low-rank form a rotation measured no better than none (int4 cores at half of the
    parameters: 0.2415 for 0.2418), and fits for three times as long.
    """
    b = _width(in_, max(multiple, WIDTH))
    if ratio < 1 or b < max(multiple, 2):
        return []
    return [Spec("disentangled", (), ((out, 1), (1, in_ // b), (1, b)))]


def _width(in_: int, most: int) -> int:
    """The largest power of two that divides the inputs, at most `most`."""
    return min(in_ & -in_, 1 << (most.bit_length() - 1))


def exact(out: int, in_: int) -> list[Spec]:
    """Whole, and at full rank, in groups of a power of two; and one group of everything."""
    b = _width(in_, WIDTH)
    groups, one = ((out, 1), (1, in_ // b), (1, b)), ((out, 1), (1, 1), (1, in_))
    return [
        Spec("disentangled", (), groups),
        Spec("disentangled", (min(out, in_),), groups),
        Spec("disentangled", (), one),
    ]
