"""Prices are recovered from timings that follow them, and a contraction costs what its steps cost."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from landscapes_for_tests import X64

from edgec.errors import PlanError
from edgec.fit import contraction_of
from edgec.modeling import Layer
from edgec.plan.candidates import candidates
from edgec.plan.latency import CostModel, Kernel, Prices, Sample, fit_costs, kernel
from edgec.plan.planner import make_choice
from edgec.quantize.formats import CoreFormat
from edgec.records import Spec

SHAPES = ((64, 512), (384, 384), (1536, 384), (384, 1536), (1024, 1024))
FORMATS = ("int4-b32", "int8-b32", "fp32")


def of_bits(four: float, eight: float, floats: float) -> dict[Kernel, float]:
    return {(4, ""): four, (8, ""): eight, (32, ""): floats}


def samples(prices: Prices, rows: int, noise: float = 0.0, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [
        (n, k, name, rows, prices.matmul(n, k, CoreFormat.parse(name), rows) * float(np.exp(noise * z)))
        for name in FORMATS
        for (n, k), z in zip(SHAPES, rng.normal(size=len(SHAPES)), strict=True)
    ]


@settings(max_examples=15, deadline=None)
@given(byte=st.floats(1e-9, 1e-6), flop=st.floats(1e-10, 1e-7), node=st.floats(1e-4, 1e-2), rows=st.integers(1, 128))
def test_prices_are_recovered(byte: float, flop: float, node: float, rows: int) -> None:
    truth = Prices(byte, of_bits(flop, 2 * flop, 3 * flop), node)
    model = fit_costs(samples(truth, rows))
    assert model.misfit < 1e-6
    for n, k in ((200, 704), (2048, 512)):
        for fmt in map(CoreFormat.parse, FORMATS):
            assert model.matmul(n, k, fmt, rows) == pytest.approx(truth.matmul(n, k, fmt, rows), rel=1e-3)


def test_noise_gives_no_negative_price() -> None:
    truth = Prices(1e-8, of_bits(1e-9, 1e-9, 1e-9), 1e-3)
    for seed in range(20):
        prices = fit_costs(samples(truth, 16, noise=0.5, seed=seed)).prices[16]
        assert min(prices.byte, prices.node, *prices.flop.values()) >= 0


def test_rows_between_and_beyond() -> None:
    truth = Prices(1e-8, of_bits(1e-9, 1e-9, 1e-9), 1e-3)
    model = fit_costs([*samples(truth, 1), *samples(truth, 128)])
    fmt = CoreFormat(4, 32)
    costs = [model.matmul(512, 512, fmt, rows) for rows in (1, 2, 16, 128, 256, 1024)]
    assert costs == sorted(costs)
    assert costs[-1] == pytest.approx(8 * costs[3] - 7 * model.prices[128].node)
    assert math.log(costs[2]) == pytest.approx(
        math.log(costs[0]) + (math.log(costs[3]) - math.log(costs[0])) * math.log(16) / math.log(128)
    )


@pytest.fixture
def model() -> CostModel:
    prices = Prices(1e-8, of_bits(1e-9, 2e-9, 3e-9), 1e-3)
    return CostModel({1: prices, 128: prices}, 0.0)


def test_a_contraction_costs_its_steps(model: CostModel) -> None:
    fmt = CoreFormat(4, 32)
    low_rank = contraction_of(Spec("svd", (64,)), (512, 256), "linear")
    assert model.contraction(low_rank, fmt, 1) == pytest.approx(
        model.matmul(64, 256, fmt, 1) + model.matmul(512, 64, fmt, 1)
    )
    table = make_choice(Layer("e", "embedding", (1000, 64)), Spec("dense"), fmt)
    assert model.choice(table) == 1e-3


def test_every_candidate_has_a_cost_that_grows_with_rows(model: CostModel) -> None:
    layer = Layer("block.0.up", "linear", (384, 256))
    kinds = set()
    for spec, fmt in candidates([X64], "linear", layer.shape):
        choice = make_choice(layer, spec, fmt)
        kinds.add(spec.kind)
        assert 0 < model.choice(choice) < model.choice(choice, 128)
    assert {"dense", "svd", "tensor_train"} <= kinds


def test_a_train_of_small_cores_is_not_free(model: CostModel) -> None:
    layer = Layer("block.0.up", "linear", (384, 256))
    trains = [
        make_choice(layer, s, f) for s, f in candidates([X64], "linear", layer.shape) if s.kind == "tensor_train"
    ]
    for train in trains:
        assert model.choice(train) > 3e-3, "reshapes, a transposition and two products are nodes"


def test_too_few_timings_are_refused() -> None:
    truth = Prices(1e-8, of_bits(1e-9, 1e-9, 1e-9), 1e-3)
    some = samples(truth, 1)
    for few in (some[:2], [], [(*s[:4], float("nan")) for s in some]):
        with pytest.raises(PlanError, match="timing"):
            fit_costs(few)
    assert fit_costs([*some, (64, 64, "int4-b32", 1, -1.0)]) == fit_costs(some)
    assert replace(fit_costs(some), misfit=0.0).prices.keys() == {1}


def test_ggml_has_a_kernel_for_every_type() -> None:
    """And a row that a type's blocks do not divide is multiplied as the type that it is stored in."""
    q4_k, iq4_xs, q5_k = map(CoreFormat.parse, ("q4_k", "iq4_xs", "q5_k"))
    assert kernel(q4_k, 512) == (4, "Q4_K") != kernel(iq4_xs, 512)
    assert kernel(q4_k, 288) == (4, "Q5_0")
    prices = Prices(0.0, {(4, ""): 1.0, (4, "Q4_K"): 2.0, (4, "IQ4_XS"): 3.0, (5, "Q5_K"): 4.0}, 0.0)
    assert [prices.matmul(1, 512, fmt, 1) / 1024 for fmt in (q4_k, iq4_xs, q5_k)] == [2.0, 3.0, 4.0]
    assert prices.matmul(1, 512, CoreFormat.parse("q6_k"), 1) == 4 * 1024  # not measured: the nearest bits
