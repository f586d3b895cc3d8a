"""Refinement on landscapes whose truth is known: it gains what there is to gain, within its limits, and never loses."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from landscapes_for_tests import LINEAR_PARAMETERS, SIZES, X64, profile, truth

from edgec.errors import PlanError, UsageError
from edgec.plan.budget import parse_budget
from edgec.plan.corrections import predicted
from edgec.plan.offer import Offer, uniform_rivals
from edgec.plan.refine import Found, Ledger, Search, key_of, refine
from edgec.records import Choice

MISLED = truth({"svd int4": 0.35, "svd int8": 0.35, "residual int2+int8": 3.0}, {0: 4.0, 3: 0.5})


PROFILE = profile()


def offer(bits: float) -> Offer:
    return Offer.of(PROFILE.layers, X64, parse_budget(f"{bits}bpw-linear"), SIZES)


def starts(at: Offer) -> list[tuple[str, list[Choice]]]:
    return [("allocated", at.allocate()), *uniform_rivals(at, X64)]


def refined(bits: float, evaluate: object = MISLED, search: Search | None = None) -> tuple[Found, Ledger]:
    at = offer(bits)
    ledger = Ledger(evaluate)  # type: ignore[arg-type]
    return refine(at, starts(at), ledger, search or Search()), ledger


@pytest.mark.parametrize("bits", [2.5, 3, 4])
def test_most_of_what_mispredictions_cost_is_recovered(bits: float) -> None:
    at = offer(bits)
    ideal = MISLED(at.allocate(lambda c: MISLED([c])))
    allocated = MISLED(at.allocate())
    found, ledger = refined(bits)
    assert allocated > 1.03 * ideal, "nothing to gain: the test would prove nothing"
    assert found.loss - ideal < 0.4 * (allocated - ideal)
    assert found.loss == MISLED(found.choices)
    assert at.fits(found.choices)
    assert ledger.count == found.evaluations <= 24


@settings(max_examples=6, deadline=None)
@given(bits=st.floats(2.2, 6.0), factor=st.floats(0.2, 5.0), evaluations=st.integers(1, 30))
def test_never_worse_than_the_best_start_and_within_the_budget(bits: float, factor: float, evaluations: int) -> None:
    at, measure = offer(bits), truth({"dense int4": factor}, {1: 1 / factor}, -0.1)
    found, ledger = refined(bits, measure, Search(evaluations=evaluations))
    assert found.loss <= found.before == min(measure(plan) for _, plan in starts(at))
    assert sum(c.bytes for c in found.choices if c.role == "linear") <= bits * LINEAR_PARAMETERS / 8
    assert ledger.count <= max(evaluations, len(starts(at)))
    assert all(c.loss == predicted(c) and c in at.choices[c.layer] for c in found.choices if c.role == "linear")


def test_the_same_search_twice_is_the_same_plan() -> None:
    one, two = refined(3), refined(3)
    assert key_of(one[0].choices) == key_of(two[0].choices)
    assert [loss for _, loss in one[1].records] == [loss for _, loss in two[1].records]


def test_a_right_prediction_is_left_alone() -> None:
    found, ledger = refined(3, truth())
    assert found.loss == pytest.approx(found.before, rel=0.01)
    assert ledger.count < 24, "a batch that does not help ends the search"


def test_no_search_measures_the_starts_only() -> None:
    found, ledger = refined(3, search=Search("none"))
    assert ledger.count == len(starts(offer(3)))
    assert found.loss == found.before


def test_a_time_limit_ends_the_search() -> None:
    now = 0.0

    def evaluate(choices: list[Choice]) -> float:
        nonlocal now
        now += 1.0
        return MISLED(choices)

    at = offer(3)
    ledger = Ledger(evaluate, clock=lambda: now)
    found = refine(at, starts(at), ledger, Search(seconds=len(starts(at)) + 3.5))
    assert len(starts(at)) < found.evaluations <= len(starts(at)) + 4
    assert found.seconds == found.evaluations


def test_a_goal_is_enough() -> None:
    at, ledger = offer(3), Ledger(MISLED)
    whole, _ = refined(3)
    goal = (whole.loss + whole.before) / 2
    found = refine(at, starts(at), ledger, Search(), goal=goal)
    assert found.loss <= goal
    assert found.evaluations <= whole.evaluations


def test_broken_plans_never_win() -> None:
    at = offer(3)
    allocated = key_of(at.allocate())
    found, _ = refined(3, lambda choices: math.nan if key_of(choices) == allocated else MISLED(choices))
    assert found.name != "allocated"
    assert found.loss < math.inf
    with pytest.raises(PlanError, match="no plan gives a finite loss"):
        refined(3, lambda choices: math.nan)


def test_progress_is_told() -> None:
    told: list[tuple[int, int, float]] = []
    at = offer(3)
    refine(at, starts(at), Ledger(MISLED), Search(), lambda *args: told.append(args))
    assert [t[2] for t in told] == sorted((t[2] for t in told), reverse=True)
    assert all(0 < done <= total == 24 for done, total, _ in told)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"method": "genetic"}, "expected one of greedy, none, anneal"),
        ({"evaluations": 0}, "at least 1 plan"),
        ({"seconds": 0.0}, "expected a positive number"),
        ({"seconds": math.nan}, "expected a positive number"),
    ],
)
def test_searches_that_mean_nothing(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Search(**arguments)  # type: ignore[arg-type]
