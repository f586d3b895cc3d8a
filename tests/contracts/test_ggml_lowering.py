"""Every decomposition that edgec finds, through ggml: the third lowering of the contraction wall agrees with numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec import decompose
from edgec.contraction import (
    Contraction,
    MatMul,
    ReduceSum,
    Reshape,
    Scale,
    Step,
    Sum,
    Transpose,
    core_shapes,
    evaluate,
)
from edgec.fit import contraction_of, fit
from edgec.quantize.formats import CoreFormat
from edgec.records import Spec

pytest.importorskip("llama_cpp")

from ggml_for_tests import evaluate_on_ggml

SHAPES = [(24, 24), (48, 20), (7, 30), (1, 12), (12, 1)]
TABLES = [(101, 24), (20, 48), (12, 1)]


def cases(role: str, shapes: list[tuple[int, int]]) -> list[Any]:
    found = []
    for kind in decompose.kinds_of(role):
        for shape in shapes:
            specs = (Spec("dense"),) if kind == "dense" else tuple(decompose.get(kind).exact(*shape))
            found += [pytest.param(spec, shape, id=f"{shape[0]}x{shape[1]} {spec}") for spec in specs]
    return found


@pytest.mark.parametrize(("spec", "shape"), cases("linear", SHAPES))
@pytest.mark.parametrize("tokens", [1, 5])
def test_products_agree_with_numpy(spec: Spec, shape: tuple[int, int], tokens: int) -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal(shape).astype(np.float32)
    factors = fit(weight, spec, CoreFormat(32))
    x = generator.standard_normal((tokens, shape[1])).astype(np.float32)
    found = evaluate_on_ggml(factors.contraction, factors.values(), x)
    expected = evaluate(factors.contraction, {n: c.astype(np.float64) for n, c in factors.values().items()}, x)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(("spec", "shape"), cases("embedding", TABLES))
def test_lookups_agree_with_numpy(spec: Spec, shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    contraction = contraction_of(spec, shape, "embedding")
    cores = {n: generator.standard_normal(s).astype(np.float32) for n, s in core_shapes(contraction).items()}
    ids = generator.integers(0, shape[0], 9).astype(np.int32)
    expected = evaluate(contraction, cores, ids)
    found = evaluate_on_ggml(contraction, cores, ids)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(3)), st.lists(st.integers(1, 4), min_size=3, max_size=3), st.integers(0, 2))
def test_any_rearrangement(perm: list[int], shape: list[int], axis: int) -> None:
    """Each order of the axes, each axis summed, each followed by what shows a wrong order."""
    a, b, c = shape
    after = [shape[p] for p in perm]
    left = [n for i, n in enumerate(after) if i != axis]
    steps: tuple[Step, ...] = (
        Reshape((a, b, c)),
        Transpose(tuple(perm)),
        Scale("s", after[-1]),
        ReduceSum(axis),
        Sum(((MatMul("m", 3, left[1]),), (MatMul("n", 3, left[1]),))),
        Reshape((3 * left[0],)),
    )
    contraction = Contraction(3 * left[0], a * b * c, steps)
    generator = np.random.default_rng(1)
    cores = {n: generator.standard_normal(s).astype(np.float32) for n, s in core_shapes(contraction).items()}
    x = generator.standard_normal((2, a * b * c)).astype(np.float32)
    found = evaluate_on_ggml(contraction, cores, x)
    np.testing.assert_allclose(found, evaluate(contraction, cores, x), atol=1e-4, rtol=1e-4)
