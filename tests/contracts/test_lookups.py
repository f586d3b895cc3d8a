"""Every decomposition of lookup tables that edgec finds, tried against the same cases in the numpy, torch and ONNX
lowerings."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphs_for_tests import LAYER, run_graph, session, table_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgec import decompose
from edgec.compress.modules import FactoredEmbedding
from edgec.contraction import core_shapes, evaluate, parameters
from edgec.errors import NumericsError, PlanError
from edgec.export.onnx.lowering import lower
from edgec.fit import Factors, contraction_of, fit, stored_bytes
from edgec.moments import SecondMoment, TableMoment
from edgec.quantize.formats import CoreFormat, LayerFormat, QuantizedTensor
from edgec.records import Spec

FP32 = CoreFormat(32)
SHAPES = [(101, 24), (64, 64), (20, 48), (1, 12), (12, 1)]
ROLE = "embedding"


def table_of(v: int, d: int, seed: int = 0) -> NDArray[np.float32]:
    """Rows of falling size in correlated columns, as tokens sorted by frequency are."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((d, d)) * np.exp(-np.arange(d) * 3 / d)[:, None]
    return (generator.standard_normal((v, d)) @ mixing * np.linspace(2, 0.5, v)[:, None]).astype(np.float32)


def moment_of(v: int, d: int, seed: int = 1) -> TableMoment:
    """A curvature with a strong direction, and reads that fall like Zipf's law."""
    generator = np.random.default_rng(seed)
    g = generator.standard_normal((4 * d, d)) * np.exp(-np.arange(d) * 3 / d)
    rows = 1 / np.arange(1, v + 1)
    return TableMoment(g.T @ g / (4 * d), rows / rows.sum())


def cost(error: NDArray[Any], moment: TableMoment) -> float:
    """Σ_v rows_v E_v G E_vᵀ."""
    e = error.astype(np.float64)
    return float(((e @ moment.matrix) * e).sum(1) @ moment.rows)


def specs() -> list[Any]:
    cases = []
    for kind in decompose.lookups():
        for shape in SHAPES:
            exact = decompose.get(kind).exact(*shape)
            assert exact, f"{kind}: exact{shape} gives nothing to test"
            cases += [pytest.param(spec, shape, id=f"{shape[0]}x{shape[1]} {spec}") for spec in exact]
    return cases


def half(spec: Spec) -> Spec:
    return replace(spec, ranks=tuple(max(1, rank // 2) for rank in spec.ranks))


def formats(spec: Spec, *names: str) -> list[LayerFormat]:
    """The named formats, and, where the form has a backbone, pairs of them."""
    pairs = [f"{a}+{b}" for a, b in pairwise(names)] if len(spec.ranks) > 1 else []
    return [LayerFormat.parse(name) for name in (*names, *pairs)]


def torch_of(factors: Factors, ids: NDArray[Any]) -> NDArray[Any]:
    with torch.no_grad():
        result: NDArray[Any] = FactoredEmbedding.from_factors(factors)(torch.from_numpy(ids)).numpy()
    return result


def onnx_of(factors: Factors, table: NDArray[Any], ids: NDArray[Any], folder: Path) -> NDArray[Any]:
    graph = table_graph(table)
    lower(graph, {LAYER: factors}, accuracy_level=0)
    return run_graph(graph.model, folder, ids)


def relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1.0))


def test_tables_and_matrices_have_their_own_kinds() -> None:
    assert "table_svd" in decompose.lookups()
    assert not set(decompose.lookups()) & set(decompose.kinds())
    assert decompose.kinds_of("embedding") == ("dense", *decompose.lookups())
    assert decompose.kinds_of("linear") == decompose.kinds_of("head") == decompose.kinds()
    with pytest.raises(PlanError, match="role 'linear' can be .*dense.*got table_svd"):
        contraction_of(Spec("table_svd", (4,)), (16, 16), "linear")
    with pytest.raises(PlanError, match="role 'embedding' can be dense, .*got svd"):
        contraction_of(Spec("svd", (4,)), (16, 16), "embedding")


@pytest.mark.parametrize(("spec", "shape"), specs())
def test_full_rank_is_the_table(spec: Spec, shape: tuple[int, int], tmp_path: Path) -> None:
    table, (v, d) = table_of(*shape), shape
    ids = np.array([[0, v - 1, v // 2], [v // 3, 0, 0]])
    for moment in (None, moment_of(v, d), TableMoment(np.zeros((d, d)), np.full(v, 1 / v))):
        factors = fit(table, spec, FP32, role=ROLE, moment=moment)
        assert factors.contraction.lookup
        for found in (evaluate(factors.contraction, factors.values(), ids), torch_of(factors, ids)):
            assert relative(found, table[ids]) <= 1e-4
    assert relative(onnx_of(factors, table, ids, tmp_path), table[ids]) <= 1e-4


@pytest.mark.parametrize(("spec", "shape"), specs())
def test_costs_are_known_before_and_true_after(spec: Spec, shape: tuple[int, int]) -> None:
    for fmt in formats(half(spec), "fp32", "fp16", "int8-b16", "int4-b32", "int2-b16-zp"):
        factors = fit(table_of(*shape), half(spec), fmt, role=ROLE)
        assert factors.stored_bytes == stored_bytes(half(spec), shape, ROLE, fmt)
        shapes = core_shapes(factors.contraction)
        assert {n: tuple(c.shape) for n, c in factors.cores.items()} == shapes
        assert parameters(factors.contraction) == sum(prod(s) for s in shapes.values())


@pytest.mark.parametrize(("spec", "shape"), specs())
def test_same_input_same_bytes(spec: Spec, shape: tuple[int, int]) -> None:
    """Whatever was fitted before: scoring tries one table at many ranks."""
    table, moment = table_of(*shape), moment_of(*shape)
    fit(table, spec, FP32, role=ROLE, moment=moment)
    for fmt in formats(half(spec), "fp32", "int4-b16"):
        warm = fit(table, half(spec), fmt, role=ROLE, moment=moment)
        cold = fit(table.copy(), half(spec), fmt, role=ROLE, moment=moment_of(*shape))
        for core, values in warm.values().items():
            np.testing.assert_array_equal(values, cold.values()[core])


@pytest.mark.parametrize("kind", decompose.lookups())
@pytest.mark.parametrize("name", ["fp16", "int8-b32", "int4-b32", "int2-b32", "int2-b32-zp", "int2-b32+int4-b32"])
def test_quantised_cores_agree_in_onnxruntime_and_torch(kind: str, name: str, tmp_path: Path) -> None:
    shape = (101, 128)
    table, ids = table_of(*shape), np.array([[0, 100, 7], [7, 55, 0]])
    for number, ranks in enumerate([(64,), (32, 64)]):
        if "+" in name and len(ranks) == 1:
            with pytest.raises(PlanError, match="backbone"):
                fit(table, Spec(kind, ranks), LayerFormat.parse(name), role=ROLE)
            continue
        factors = fit(table, Spec(kind, ranks), LayerFormat.parse(name), role=ROLE, moment=moment_of(*shape))
        found = onnx_of(factors, table, ids, tmp_path / str(number))
        assert relative(found, torch_of(factors, ids)) <= 1e-4


@pytest.mark.parametrize("kind", decompose.lookups())
def test_no_dense_table_in_the_truncated_graph(kind: str, tmp_path: Path) -> None:
    """Neither in what is written nor in what onnxruntime makes of it when it loads."""
    v, d = 101, 128
    table = table_of(v, d)
    for number, ranks in enumerate([(64,), (32, 32)]):
        for fmt in (FP32, CoreFormat(4, 32)):
            graph = table_graph(table)
            lower(graph, {LAYER: fit(table, Spec(kind, ranks), fmt, role=ROLE)}, accuracy_level=0)
            folder = tmp_path / f"{number}-{fmt}"
            session(graph.model, folder, folder / "optimized.onnx")
            for file in (folder / "model.onnx", folder / "optimized.onnx"):
                shapes = [list(i.dims) for i in onnx.load(file, load_external_data=False).graph.initializer]
                assert shapes
                assert all(prod(dims) < v * d for dims in shapes), shapes
    assert (folder / "model.onnx.data").stat().st_size < v * d


@pytest.mark.parametrize("kind", decompose.lookups())
def test_ranks_that_do_not_fit_are_refused(kind: str) -> None:
    shape = (40, 24)
    for spec in decompose.get(kind).exact(*shape):
        for cut, top in enumerate(spec.ranks):
            for rank in (top + 1, 0, -1):
                wrong = replace(spec, ranks=(*spec.ranks[:cut], rank, *spec.ranks[cut + 1 :]))
                with pytest.raises(PlanError, match="outside 1"):
                    contraction_of(wrong, shape, ROLE)
        for wrong in (replace(spec, ranks=()), replace(spec, ranks=(2, 2, 2)), replace(spec, modes=((40, 24),))):
            with pytest.raises(PlanError):
                contraction_of(wrong, shape, ROLE)
    with pytest.raises(PlanError, match="neither ranks nor modes"):
        contraction_of(Spec("dense", (3,)), shape, ROLE)


@pytest.mark.parametrize("kind", decompose.lookups())
@pytest.mark.parametrize("ratio", [0.3, 0.5, 2 / 3, 1.0])
def test_suggestions_fit_and_keep_the_ratio(kind: str, ratio: float) -> None:
    for v, d in [(30522, 384), (1000, 64), (128256, 2048), (37, 41)]:
        for multiple in (1, 32):
            for spec in decompose.get(kind).suggest(v, d, ratio, multiple):
                contraction_of(spec, (v, d), ROLE)
                assert sum(spec.ranks) <= ratio * d
                assert all(rank % multiple == 0 for rank in spec.ranks)
    assert decompose.get(kind).suggest(30522, 384, 0.5, 32)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    table = table_of(30, 16)
    table[3, 3] = bad
    with pytest.raises(NumericsError, match="NaN or Inf"):
        fit(table, Spec("table_svd", (4,)), FP32, role=ROLE)
    with pytest.raises(NumericsError, match="NaN or Inf"):
        TableMoment(np.eye(2), np.array([bad, 1.0]))
    with pytest.raises(NumericsError, match="negative"):
        TableMoment(np.eye(2), np.array([-1.0, 1.0]))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), rank=st.integers(1, 15), second=st.integers(0, 8))
def test_low_rank_reaches_the_optimum(seed: int, rank: int, second: int) -> None:
    """The cost is the sum of the squared singular values of √f W R that were cut (Eckart–Young), G = R Rᵀ."""
    shape = (60, 24)
    table, moment = table_of(*shape, seed), moment_of(*shape, seed + 1)
    weighed = np.sqrt(moment.rows.astype(np.float64))[:, None] * table @ np.linalg.cholesky(moment.matrix)
    values = np.linalg.svd(weighed, compute_uv=False)
    ranks = (rank, second) if second else (rank,)
    found = cost(table - fit(table, Spec("table_svd", ranks), FP32, role=ROLE, moment=moment).dense(), moment)
    best = float((values[sum(ranks) :] ** 2).sum())
    assert found == pytest.approx(best, rel=1e-2, abs=1e-6 * float((values**2).sum()))


def test_mixers_are_fitted_to_the_rounded_tables() -> None:
    """Against the same tables under the mixers that the unrounded ones would have."""
    shape, spec, fmt = (400, 64), Spec("table_svd", (16, 16)), LayerFormat.parse("int2-b16+int4-b16")
    better = 0
    for seed in range(5):
        table, moment = table_of(*shape, seed), moment_of(*shape, seed + 50)
        rounded, exact = (fit(table, spec, f, role=ROLE, moment=moment) for f in (fmt, FP32))
        mixed = {**rounded.values(), **{n: v for n, v in exact.values().items() if n.startswith("mix")}}
        rows = evaluate(rounded.contraction, mixed, np.arange(shape[0]))
        better += cost(table - rounded.dense(), moment) < cost(table - rows, moment)
    assert better == 5


def test_dense_tables_are_rounded_along_the_curvature() -> None:
    """GPTQ with the curvature beats rounding to nearest, in what it is for."""
    shape = (300, 64)
    table, moment = table_of(*shape), moment_of(*shape)
    for name in ("int4-b32", "int2-b32", "int2-b64"):
        fmt = CoreFormat.parse(name)
        along, plain = (fit(table, Spec("dense"), fmt, role=ROLE, moment=m) for m in (moment, None))
        assert isinstance(along.cores["weight"], QuantizedTensor)
        assert cost(table - along.dense(), moment) < 0.9 * cost(table - plain.dense(), moment)


def test_mixers_keep_eight_bits() -> None:
    factors = fit(table_of(101, 128), Spec("table_svd", (32, 32)), LayerFormat.parse("int2-b32+int4-b32"), role=ROLE)
    found = {name: str(core.fmt) for name, core in factors.cores.items() if isinstance(core, QuantizedTensor)}
    assert found == {"rows": "int4-b32", "mix": "int8-b32", "backbone": "int2-b32", "mix_backbone": "int8-b32"}


@given(moment=st.sampled_from([SecondMoment(np.eye(8)), None]))
@settings(max_examples=2, deadline=None)
def test_rows_count_alike_where_reads_are_unknown(moment: SecondMoment | None) -> None:
    table = table_of(30, 8)
    error = np.linalg.norm(table - fit(table, Spec("table_svd", (3,)), FP32, role=ROLE, moment=moment).dense())
    assert error == pytest.approx(np.sqrt((np.linalg.svd(table, compute_uv=False)[3:] ** 2).sum()), rel=1e-4)
