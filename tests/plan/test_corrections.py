"""Factors are recovered from whole plans, and stay at 1 where nothing was measured."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from landscapes_for_tests import SIZES, X64, profile, truth

from edgec.plan.budget import parse_budget
from edgec.plan.corrections import Corrections, Groups, block_of, form_of, learn, predicted
from edgec.plan.offer import Offer
from edgec.records import Choice, Spec

OFFER = Offer.of(profile().layers, X64, parse_budget("4bpw-linear"), SIZES)
GROUPS = Groups.of_layers(list(OFFER.choices))


def plans(count: int, seed: int = 0) -> list[list[Choice]]:
    rng = random.Random(seed)
    return [[rng.choice(list(offered)) for offered in OFFER.choices.values()] for _ in range(count)]


def test_layers_are_placed_in_their_blocks() -> None:
    assert block_of("model.layers.11.mlp.up_proj") == 11
    assert block_of("h.0.attn") == 0
    assert block_of("lm_head") is None
    assert block_of("wte2.weight") is None
    dense = Choice("encoder.layer.11.attention.self.query", "linear", (8, 8), Spec("dense"), "int4-b64", 1, 1)
    assert Groups(12).of(dense) == ("form: dense int4", "depth: 5", "matrix: attention.self.query")
    assert Groups(3).of(Choice("h.2.up", "linear", (8, 8), Spec("svd", (2,)), "int8-b32", 1, 1))[1] == "depth: 2"
    pair = Choice("h.2.up", "linear", (8, 8), Spec("residual", (2,)), "int2-b64+int8-b32", 1, 1)
    assert form_of(pair) == "residual int2+int8"
    assert Groups(3).of(Choice("wte", "embedding", (8, 8), Spec("dense"), "int8-b32", 1, 1)) == (
        "form: embedding dense int8",
    )


def test_nothing_measured_is_as_predicted() -> None:
    for records in ([], [(plans(1)[0], math.inf)], [(plans(1)[0], -0.1)]):
        learned = learn(GROUPS, records)
        assert all(learned(c) == predicted(c) for c in plans(3)[2])


@settings(max_examples=15, deadline=None)
@given(svd=st.floats(0.4, 2.5), first=st.floats(0.5, 2.0))
def test_factors_are_recovered_from_whole_plans(svd: float, first: float) -> None:
    measure = truth({"svd int4": svd, "svd int8": svd}, {0: first})
    learned = learn(GROUPS, [(p, measure(p)) for p in plans(40)])
    for plan in plans(10, seed=1):
        assert sum(map(learned, plan)) == pytest.approx(measure(plan), rel=0.25)
    layer = OFFER.choices["block.1.up"]
    dense = next(c for c in layer if str(c.spec) == "dense" and c.format == "int4-b32")
    factored = next(c for c in layer if c.spec.kind == "svd" and c.format == "int4-b32")
    ratio = math.log(learned(factored) / predicted(factored)) - math.log(learned(dense) / predicted(dense))
    assert abs(ratio - math.log(svd)) < 0.65 * abs(math.log(svd)) + 0.1, "nearer to the truth than the prediction is"


def test_overlap_is_not_taken_for_a_form() -> None:
    """Losses that grow slower than their sum, everywhere alike, leave the ranking of forms nearly alone."""
    measure = truth(overlap=-0.15)
    learned = learn(GROUPS, [(p, measure(p)) for p in plans(60)])
    forms = [v for k, v in learned.logs.items() if k.startswith("form: ") and "int" in k and "linear" not in k]
    assert max(forms) - min(forms) < 0.6


def test_tilts_and_shares() -> None:
    plan = plans(1)[0]
    plain = Corrections(GROUPS)
    tilted = plain.tilted("depth: 1", math.log(3))
    for choice in plan:
        expected = 3 if "depth: 1" in GROUPS.of(choice) else 1
        assert tilted(choice) == pytest.approx(expected * predicted(choice))
    shares = tilted.shares(plan)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert sum(v for k, v in shares.items() if k.startswith("form")) == pytest.approx(1)
