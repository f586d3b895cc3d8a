"""Every decomposition that edgec finds, tried against the same cases in the numpy, torch and ONNX lowerings."""

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
from graphs_for_tests import LAYER, linear_graph, run_graph, session, table_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgec import decompose
from edgec.compress.modules import FactoredEmbedding, FactoredLinear
from edgec.contraction import core_shapes, evaluate, parameters
from edgec.decompose import tensor_train
from edgec.errors import EdgecError, NumericsError, PlanError
from edgec.export.onnx.lowering import lower
from edgec.fit import Factors, contraction_of, fit, stored_bytes
from edgec.moments import SecondMoment
from edgec.quantize import descent
from edgec.quantize.formats import CoreFormat, QuantizedTensor
from edgec.records import Spec

FP32 = CoreFormat(32)
SHAPES = [(24, 24), (48, 20), (20, 48), (7, 30), (1, 12), (12, 1)]
WEIGHTS = ["random", "decaying", "rank deficient", "zero"]
MOMENTS = ["none", "full rank", "singular", "zero"]


def weight_of(kind: str, out: int, in_: int, seed: int = 0) -> NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    if kind == "zero":
        return np.zeros((out, in_), np.float32)
    if kind == "rank deficient":
        rank = max(1, min(out, in_) // 4)
        return (generator.standard_normal((out, rank)) @ generator.standard_normal((rank, in_))).astype(np.float32)
    decay = np.exp(-np.arange(in_) * 4 / in_) if kind == "decaying" else 1.0
    return (generator.standard_normal((out, in_)) * decay).astype(np.float32)


def moment_of(kind: str, width: int, seed: int = 1) -> SecondMoment | None:
    """Correlated inputs, as activations are; "singular" ones span a third of the width."""
    if kind == "none":
        return None
    if kind == "zero":
        return SecondMoment(np.zeros((width, width)))
    generator = np.random.default_rng(seed)
    samples = 8 * width if kind == "full rank" else max(1, width // 3)
    mixing = generator.standard_normal((width, width)) * np.exp(-np.arange(width) * 3 / width)
    x = generator.standard_normal((samples, width)) @ mixing.T
    return SecondMoment((x.T @ x / samples).astype(np.float32))


def specs() -> list[Any]:
    """Every kind at every one of the forms in which it loses nothing."""
    cases = []
    for kind in decompose.kinds():
        for out, in_ in SHAPES:
            exact = decompose.get(kind).exact(out, in_)
            assert exact, f"{kind}: exact({out}, {in_}) gives nothing to test"
            cases += [pytest.param(spec, (out, in_), id=f"{out}x{in_} {spec}") for spec in exact]
    return cases


def truncated(spec: Spec, shape: tuple[int, int], ranks: tuple[int, ...] | None = None) -> Spec:
    """The same form at about half of every rank (or at `ranks`), less where neighbours do not fit one another."""
    half = list(ranks or [max(1, rank // 2) for rank in spec.ranks])
    while True:
        found = replace(spec, ranks=tuple(half))
        try:
            contraction_of(found, shape, "linear")
        except PlanError:
            half[half.index(max(half))] -= 1
        else:
            return found


def torch_of(factors: Factors, x: NDArray[Any]) -> NDArray[Any]:
    kind = FactoredEmbedding if factors.contraction.lookup else FactoredLinear
    with torch.no_grad():
        result: NDArray[Any] = kind.from_factors(factors)(torch.from_numpy(x)).numpy()
    return result


def onnx_of(factors: Factors, weight: NDArray[Any], x: NDArray[Any], folder: Path) -> NDArray[Any]:
    graph = (table_graph if factors.contraction.lookup else linear_graph)(weight)
    lower(graph, {LAYER: factors}, accuracy_level=0)
    return run_graph(graph.model, folder, x)


def relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """‖found − expected‖ / ‖expected‖; the plain norm where nothing is expected."""
    return float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1.0))


@pytest.mark.parametrize(("spec", "shape"), specs())
def test_full_rank_is_the_weight(spec: Spec, shape: tuple[int, int]) -> None:
    x = np.random.default_rng(2).standard_normal((2, 3, shape[1])).astype(np.float32)
    for weights in WEIGHTS:
        for moments in MOMENTS:
            weight = weight_of(weights, *shape)
            factors = fit(weight, spec, FP32, moment=moment_of(moments, shape[1]))
            expected = x @ weight.T
            for lowering, found in {
                "numpy": evaluate(factors.contraction, factors.values(), x),
                "torch": torch_of(factors, x),
            }.items():
                assert relative(found, expected) <= 1e-5, (lowering, weights, moments)


@pytest.mark.parametrize(("spec", "shape"), specs())
def test_full_rank_is_the_weight_in_onnxruntime(spec: Spec, shape: tuple[int, int], tmp_path: Path) -> None:
    x = np.random.default_rng(2).standard_normal((2, 3, shape[1])).astype(np.float32)
    for moments in ("none", "full rank"):
        weight = weight_of("random", *shape)
        factors = fit(weight, spec, FP32, moment=moment_of(moments, shape[1]))
        assert relative(onnx_of(factors, weight, x, tmp_path / moments), x @ weight.T) <= 1e-5, moments


@pytest.mark.parametrize(("spec", "shape"), specs())
def test_same_input_same_bytes(spec: Spec, shape: tuple[int, int]) -> None:
    for name in ("fp32", "int4-b16"):
        fmt = CoreFormat.parse(name)
        first, second = (
            fit(weight_of("random", *shape), truncated(spec, shape), fmt, moment=moment_of("full rank", shape[1]))
            for _ in range(2)
        )
        for core, stored in first.cores.items():
            other = second.cores[core]
            if isinstance(stored, QuantizedTensor):
                assert isinstance(other, QuantizedTensor)
                assert stored.packed().tobytes() == other.packed().tobytes()
                assert stored.scales.tobytes() == other.scales.tobytes()
            else:
                assert not isinstance(other, QuantizedTensor)
                assert stored.tobytes() == other.tobytes()


@pytest.mark.parametrize("kind", decompose.kinds())
def test_a_cached_bond_changes_no_bytes(kind: str) -> None:
    """Scoring fits one weight at many ranks; what an earlier fit left behind must not show."""
    shape = (24, 36)
    weight, moment = weight_of("decaying", *shape), moment_of("full rank", 36)
    for spec in decompose.get(kind).exact(*shape):
        fit(weight, spec, FP32, moment=moment)
        warm = fit(weight, truncated(spec, shape), FP32, moment=moment)
        cold = fit(weight.copy(), truncated(spec, shape), FP32, moment=moment)
        for name, values in warm.values().items():
            np.testing.assert_array_equal(values, cold.values()[name])


@pytest.mark.parametrize(("spec", "shape"), specs())
def test_costs_are_known_before_and_true_after(spec: Spec, shape: tuple[int, int]) -> None:
    for name in ("fp32", "fp16", "int8-b16", "int4-b32", "int2-b64", "int4-b16-zp"):
        fmt = CoreFormat.parse(name)
        factors = fit(weight_of("random", *shape), truncated(spec, shape), fmt)
        assert factors.stored_bytes == stored_bytes(truncated(spec, shape), shape, "linear", fmt)
        shapes = core_shapes(factors.contraction)
        assert {n: tuple(c.shape) for n, c in factors.cores.items()} == shapes
        assert parameters(factors.contraction) == sum(prod(s) for s in shapes.values())


@pytest.mark.parametrize(("spec", "shape"), specs())
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(spec: Spec, shape: tuple[int, int], bad: float) -> None:
    weight = weight_of("random", *shape)
    weight[-1, -1] = bad
    for fmt in (FP32, CoreFormat.parse("int4-b16")):
        with pytest.raises(NumericsError, match="NaN or Inf"):
            fit(weight, spec, fmt)


@pytest.mark.parametrize("kind", decompose.kinds())
def test_ranks_and_modes_that_do_not_fit_are_refused(kind: str) -> None:
    shape = (24, 36)
    for spec in decompose.get(kind).exact(*shape):
        for cut, top in enumerate(spec.ranks):
            for rank in (top + 1, 0, -1):
                wrong = replace(spec, ranks=(*spec.ranks[:cut], rank, *spec.ranks[cut + 1 :]))
                with pytest.raises(PlanError, match=rf"rank {rank} .*{top}, the cut's maximum"):
                    contraction_of(wrong, shape, "linear")
        if spec.ranks or kind == "dense":  # other forms without ranks have a sister with one
            with pytest.raises(PlanError):
                contraction_of(replace(spec, ranks=(*spec.ranks, 1)), shape, "linear")
        if spec.modes:
            with pytest.raises(PlanError, match="multiply to"):
                contraction_of(spec, (24, 37), "linear")
            with pytest.raises(PlanError, match="multiply to"):
                contraction_of(replace(spec, modes=((-24, -36), *((-1, -1) for _ in spec.modes[1:]))), shape, "linear")
        else:
            with pytest.raises(PlanError):
                contraction_of(replace(spec, modes=((24, 36),)), shape, "linear")


@pytest.mark.parametrize("kind", decompose.kinds())
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_suggestions_fit_and_keep_the_ratio(kind: str, ratio: float) -> None:
    for shape in [(96, 128), (128, 96), (64, 64), (37, 41), (2048, 2048), (512, 2048)]:
        for multiple in (1, 8, 32):
            for spec in decompose.get(kind).suggest(*shape, ratio, multiple):
                contraction = contraction_of(spec, shape, "linear")
                assert parameters(contraction) <= ratio * shape[0] * shape[1]
                assert all(rank % multiple == 0 for rank in spec.ranks)


def test_whitened_svd_reaches_the_optimum() -> None:
    """‖(W − W̃)L‖² is the sum of the squared singular values of W L that were cut (Eckart–Young), H = L Lᵀ."""
    for shape in [(24, 36), (36, 24)]:
        weight, moment = weight_of("decaying", *shape), moment_of("full rank", shape[1])
        assert moment is not None
        values = np.linalg.svd(weight @ np.linalg.cholesky(moment.matrix), compute_uv=False)
        for rank in (1, 5, 17):
            found = moment.squared(weight - fit(weight, Spec("svd", (rank,)), FP32, moment=moment).dense())
            assert found == pytest.approx(float((values[rank:] ** 2).sum()), rel=1e-3)


def test_plain_svd_reaches_the_optimum() -> None:
    weight = weight_of("decaying", 24, 36)
    values = np.linalg.svd(weight, compute_uv=False)
    for rank in (1, 5, 17):
        error = np.linalg.norm(weight - fit(weight, Spec("svd", (rank,)), FP32).dense())
        assert error == pytest.approx(np.sqrt((values[rank:] ** 2).sum()), rel=1e-5)


@pytest.mark.parametrize("fmt", ["int4-b16", "int2-b16"])
def test_refitting_to_the_quantised_core_pays(fmt: str) -> None:
    """The same train with and without telling the sweep what became of its cores."""
    shape, modes = (48, 64), ((48, 1), (1, 8), (1, 8))
    spec = Spec("tensor_train", (24, 6), modes)
    better = 0
    for seed in range(5):
        weight, moment = weight_of("decaying", *shape, seed), moment_of("full rank", shape[1], seed + 100)
        assert moment is not None
        errors = {}
        for feedback in (True, False):
            stored: dict[str, NDArray[Any]] = {}

            def finish(
                name: str,
                core: NDArray[Any],
                core_moment: SecondMoment | None,
                stored: dict[str, NDArray[Any]] = stored,
                feedback: bool = feedback,
            ) -> NDArray[Any]:
                stored[name] = descent.quantize(core, CoreFormat.parse(fmt), core_moment).dequantize()
                return stored[name] if feedback else core

            tensor_train.factorize(weight, spec, moment, finish)
            whole = evaluate(contraction_of(spec, shape, "linear"), stored, np.eye(shape[1], dtype=np.float32)).T
            errors[feedback] = moment.squared(weight - whole)
        better += errors[True] < errors[False]
    assert better == 5


@pytest.mark.parametrize("kind", [k for k in decompose.kinds() if k not in ("dense", "residual")])
def test_no_dense_tensor_in_the_truncated_graph(kind: str, tmp_path: Path) -> None:
    """Neither in what is written nor in what onnxruntime makes of it when it loads (but for the kinds whose point is a
    whole weight, quantised)."""
    shape = out, in_ = (48, 80)
    weight = weight_of("decaying", *shape)
    specs = [spec for spec in decompose.get(kind).exact(*shape) if spec.ranks]  # without ranks nothing is truncated
    assert specs
    for number, spec in enumerate(specs):
        graph = linear_graph(weight)
        lower(graph, {LAYER: fit(weight, truncated(spec, shape), FP32)}, accuracy_level=0)
        folder, optimized = tmp_path / str(number), tmp_path / str(number) / "optimized.onnx"
        session(graph.model, folder, optimized)
        for file in (folder / "model.onnx", optimized):
            inferred = onnx.shape_inference.infer_shapes(onnx.load(file, load_external_data=False)).graph
            shapes = [list(i.dims) for i in inferred.initializer]
            for info in (*inferred.value_info, *inferred.output):
                shapes.append([d.dim_value for d in info.type.tensor_type.shape.dim])
            assert shapes
            for dims in shapes:
                assert not any({a, b} == {out, in_} for a, b in pairwise(dims)), dims
                assert 0 in dims or prod(dims) < out * in_, dims


@pytest.mark.parametrize("kind", decompose.kinds())
@pytest.mark.parametrize(
    "fmt", ["fp16", "int8-b32", "int4-b32", "int4-b64", "int4-b32-zp", "int8-b16-zp", "int2-b64", "int2-b32"]
)
def test_quantised_cores_agree_in_onnxruntime_and_torch(kind: str, fmt: str, tmp_path: Path) -> None:
    shape = (48, 80)
    weight, moment = weight_of("decaying", *shape), moment_of("full rank", 80)
    x = np.random.default_rng(3).standard_normal((2, 5, 80)).astype(np.float32)
    for number, spec in enumerate(decompose.get(kind).exact(*shape)):
        factors = fit(weight, truncated(spec, shape), CoreFormat.parse(fmt), moment=moment)
        found = onnx_of(factors, weight, x, tmp_path / str(number))
        assert relative(found, torch_of(factors, x)) <= 1e-4, spec


@pytest.mark.parametrize(
    "fmt", ["fp32", "fp16", "int8-b32", "int8-b16", "int4-b32", "int4-b16", "int4-b32-zp", "int8-b16-zp"]
)
def test_a_table_agrees_in_onnxruntime_and_torch(fmt: str, tmp_path: Path) -> None:
    table = weight_of("random", 101, 64)
    factors = fit(table, Spec("dense"), CoreFormat.parse(fmt), role="embedding")
    ids = np.array([[0, 100, 7], [7, 55, 0]])
    found, expected = onnx_of(factors, table, ids, tmp_path), torch_of(factors, ids)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert relative(expected, table[ids]) <= {"fp32": 0.0, "fp16": 1e-3, "int8": 1e-2, "int4": 0.15}[fmt[:4]]


def test_a_bias_stays_outside() -> None:
    weight, bias = weight_of("random", 6, 8), torch.arange(6.0)
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    module = FactoredLinear.from_factors(fit(weight, Spec("svd", (6,)), FP32), bias)
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach().numpy(), x @ weight.T + bias.numpy(), atol=1e-5)


@st.composite
def modes(draw: st.DrawFn) -> tuple[tuple[int, int], ...]:
    """Up to four cores in any mode order: split, interleaved, and everything between, ones included."""
    order = draw(st.sampled_from(["split", "interleaved", "mixed"]))
    size = st.integers(1, 4)
    count = draw(st.integers(2, 4))
    if order == "split":
        return tuple((draw(size), 1) if k < count / 2 else (1, draw(size)) for k in range(count))
    if order == "interleaved":
        return tuple((draw(st.integers(2, 4)), draw(st.integers(2, 4))) for _ in range(min(count, 3)))
    return tuple((draw(size), draw(size)) for _ in range(count))


@settings(max_examples=80, deadline=None)
@given(modes=modes(), weights=st.sampled_from(WEIGHTS), moments=st.sampled_from(MOMENTS), seed=st.integers(0, 99))
def test_any_mode_order_is_exact_at_full_rank(
    modes: tuple[tuple[int, int], ...], weights: str, moments: str, seed: int
) -> None:
    out, in_ = prod(o for o, _ in modes), prod(i for _, i in modes)
    weight = weight_of(weights, out, in_, seed)
    spec = Spec("tensor_train", tensor_train.max_ranks(modes), modes)
    factors = fit(weight, spec, FP32, moment=moment_of(moments, in_, seed))
    x = np.random.default_rng(seed).standard_normal((3, in_)).astype(np.float32)
    assert relative(torch_of(factors, x), x @ weight.T) <= 1e-5


@settings(max_examples=80, deadline=None)
@given(modes=modes(), seed=st.integers(0, 99), data=st.data())
def test_truncation_is_quasi_optimal(modes: tuple[tuple[int, int], ...], seed: int, data: st.DataObject) -> None:
    """‖W − W̃‖² ≤ Σ over cuts of what each unfolding's own truncation loses (Oseledets 2011, Theorem 2.2)."""
    out, in_ = prod(o for o, _ in modes), prod(i for _, i in modes)
    weight = weight_of("decaying", out, in_, seed)
    ranks = tuple(data.draw(st.integers(1, top)) for top in tensor_train.max_ranks(modes))
    spec = truncated(Spec("tensor_train", ranks, modes), (out, in_), ranks)
    found = fit(weight, spec, FP32).dense()
    count = len(modes)
    tensor = weight.reshape(*(o for o, _ in modes), *(i for _, i in modes))
    paired = tensor.transpose([axis for k in range(count) for axis in (k, count + k)])
    bound = 0.0
    for cut, rank in enumerate(spec.ranks, start=1):
        values = np.linalg.svd(paired.reshape(prod(o * i for o, i in modes[:cut]), -1), compute_uv=False)
        bound += float((values[rank:] ** 2).sum())
    scale = float((weight**2).sum())
    assert float(((weight - found) ** 2).sum()) <= bound * (1 + 1e-4) + 1e-10 * scale


def test_ranks_that_their_neighbours_cannot_carry_are_refused() -> None:
    modes = ((48, 1), (1, 4), (1, 5))
    contraction_of(Spec("tensor_train", (8, 2), modes), (48, 20), "linear")
    with pytest.raises(PlanError, match="rank 9 at cut 1 .* above 8, the cut's maximum beside"):
        contraction_of(Spec("tensor_train", (9, 2), modes), (48, 20), "linear")


def test_an_unknown_kind_lists_the_known_ones() -> None:
    with pytest.raises(EdgecError, match="known: .*dense, .*svd, .*tensor_train"):
        decompose.get("../evil")
