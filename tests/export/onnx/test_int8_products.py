"""Int8 products: what they compute, what they share, and that onnxruntime folds the unpacking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs_for_tests import LAYER, linear_graph, run_graph, session
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec.contraction import Contraction, MatMul
from edgec.export.onnx.int8_products import smoothing, takes, use_float_activations
from edgec.export.onnx.lowering import lower
from edgec.export.targets import get_target, offered
from edgec.fit import Factors, fit
from edgec.moments import SecondMoment
from edgec.quantize.formats import CoreFormat
from edgec.records import Spec

Array = np.ndarray[Any, Any]
FORMATS = ("int2-b64", "int4-b32", "int4-b64", "int8-b32", "int8-b128")


def inputs(k: int, strong: int = 0, seed: int = 0) -> Array:
    """Activations [2, 40, k] as after a layer norm; `strong` channels of them are 30 times as large."""
    x = np.random.default_rng(seed).standard_normal((2, 40, k)).astype(np.float32)
    x[..., :strong] *= 30
    return x


def fitted(fmt: str, n: int = 96, k: int = 256, x: Array | None = None, seed: int = 1) -> Factors:
    weight = (np.random.default_rng(seed).standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)
    rows = None if x is None else x.reshape(-1, k)
    moment = None if rows is None else SecondMoment(rows.T @ rows / len(rows))
    return fit(weight, Spec("dense"), CoreFormat.parse(fmt), moment=moment)


def lowered(factors: Factors) -> ir.Model:
    n, k = factors.contraction.out_features, factors.contraction.in_features
    graph = linear_graph(np.zeros((n, k), np.float32))
    lower(graph, {LAYER: factors}, accuracy_level=4, int8=True)
    return graph.model


def relative(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("strong", [0, 3])
def test_the_product_is_that_of_the_codes(fmt: str, strong: int, tmp_path: Path) -> None:
    x = inputs(256, strong)
    factors = fitted(fmt, x=x)
    model = lowered(factors)
    expected = x @ factors.dense().T
    assert relative(run_graph(model, tmp_path, x), expected) < 0.03
    use_float_activations(model)
    assert relative(run_graph(model, tmp_path, x), expected) < 1e-5


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 6).map(lambda m: 8 * m),
    st.sampled_from([128, 256, 384]),
    st.floats(-4, 3),
    st.integers(0, 2**16),
)
def test_any_weights(
    tmp_path_factory: pytest.TempPathFactory, fmt: str, n: int, k: int, magnitude: float, seed: int
) -> None:
    factors = fitted(fmt, n, k, seed=seed)
    core = factors.cores["weight"]
    scales = core.scales.astype(np.float32) * np.float32(10.0**magnitude)  # type: ignore[union-attr]
    scales[0] = 0  # a row of zeros
    object.__setattr__(core, "scales", scales)
    x, model = inputs(k, seed=seed), lowered(factors)
    expected = x @ factors.dense().T
    found = run_graph(model, tmp_path_factory.mktemp("any"), x)
    assert np.abs(found[..., 0]).max() == 0
    assert relative(found, expected) < 0.03


def test_no_pair_of_products_overflows_16_bits(tmp_path: Path) -> None:
    """CPUs without VNNI add two neighbours so; three strong channels side by side cost 5 % of the product there."""
    x = inputs(256, 3)
    for fmt in FORMATS:
        for factors in (fitted(fmt, x=x), fitted(fmt)):
            session(lowered(factors), tmp_path, tmp_path / "optimized.onnx")
            stored = map(onnx.numpy_helper.to_array, onnx.load(tmp_path / "optimized.onnx").graph.initializer)
            (weights,) = [w for w in stored if w.dtype == np.int8]
            assert weights.shape == (256, 96)
            sums = np.abs(weights.astype(int)).reshape(128, 2, 96).sum(axis=1)
            assert 120 < sums.max() <= 128


def test_strong_channels_are_balanced(tmp_path: Path) -> None:
    x = inputs(256, 3)
    measured, blind = fitted("int8-b128", x=x), fitted("int8-b128")
    assert measured.input_rms is not None and blind.input_rms is None
    errors = [relative(run_graph(lowered(f), tmp_path, x), x @ f.dense().T) for f in (measured, blind)]
    assert errors[0] < errors[1]


def test_smoothing_is_of_few_channels_by_powers_of_two() -> None:
    rms = np.ones(384, np.float32)
    assert smoothing(rms) is None
    assert smoothing(np.zeros(384, np.float32)) is None
    rms[[5, 70]] = 40, 1.2
    found = smoothing(rms)
    assert found is not None and found[5] == 2 ** round(0.7 * np.log2(40)) and (np.delete(found, 5) == 1).all()


def test_onnxruntime_folds_the_unpacking(tmp_path: Path) -> None:
    x = inputs(256, 3)
    for fmt in FORMATS:
        session(lowered(fitted(fmt, x=x)), tmp_path, tmp_path / "optimized.onnx")
        found = onnx.load(tmp_path / "optimized.onnx")
        assert sorted(node.op_type for node in found.graph.node) == ["DynamicQuantizeMatMul", "Mul"], fmt


def test_products_of_one_input_share_its_quantization() -> None:
    x = inputs(256, 3)
    first, second = fitted("int4-b32", x=x), fitted("int4-b32", x=x, seed=2)
    graph = linear_graph(np.zeros((96, 256), np.float32))
    node = graph.linears[LAYER]
    twin = ir.node("MatMul", list(node.inputs), name="twin")
    twin.outputs[0].name = "z"
    graph.model.graph.insert_after(node, twin)
    graph.model.graph.outputs.append(twin.outputs[0])
    both = type(graph)(graph.model, {LAYER: node, "twin": twin}, {})
    lower(both, {"twin": second, LAYER: first}, accuracy_level=4, int8=True)
    kinds = [n.op_type for n in graph.model.graph]
    assert (kinds.count("DynamicQuantizeLinear"), kinds.count("Mul"), kinds.count("MatMulIntegerToFloat")) == (1, 1, 2)
    assert len(graph.model.functions) == 1


def test_what_is_too_narrow_is_unpacked_to_floats(tmp_path: Path) -> None:
    x, factors = inputs(32), fitted("int8-b32", 32, 32)
    model = lowered(factors)
    assert [node.op_type for node in model.graph] == ["Unpack8b32f", "MatMul"]
    assert relative(run_graph(model, tmp_path, x), x @ factors.dense().T) < 1e-6
    use_float_activations(model)
    assert relative(run_graph(model, tmp_path, x), x @ factors.dense().T) < 1e-6


def test_what_is_not_taken_stays_packed() -> None:
    for fmt, n, k in [("int4-b32-zp", 96, 256), ("int4-b64", 96, 96), ("int4-b32", 97, 256)]:
        factors = fitted(fmt, n, k)
        assert not takes(factors.cores["weight"])
        model = lowered(factors)
        assert [node.op_type for node in model.graph if node.op_type != "Cast"] == ["MatMulNBits"]
        assert not model.functions
    floats = Factors(Contraction(4, 8, (MatMul("weight", 4, 8),)), {"weight": np.zeros((4, 8), np.float32)})
    assert [node.op_type for node in lowered(floats).graph] == ["MatMul"]


def test_rotations_are_not_searched_beside_int8_products() -> None:
    target = get_target("onnx-x64")
    assert target.rotated_formats and offered(target, encoder=False) == target
    assert not offered(target, encoder=True).rotated_formats
    arm = get_target("onnx-arm64")
    assert offered(arm, encoder=True) == arm
