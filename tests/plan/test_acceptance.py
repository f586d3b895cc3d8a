"""The smallest plan that holds a line of loss."""

from __future__ import annotations

from typing import Any

import pytest
from landscapes_for_tests import LAYERS, SIZES, X64, profile, truth

from edgec.errors import BudgetError, PlanError, UsageError
from edgec.plan.acceptance import parse_max_loss, plan_to_loss
from edgec.plan.budget import parse_budget
from edgec.plan.offer import Offer
from edgec.plan.planner import check_plan, plan_to_budget
from edgec.plan.refine import Search
from edgec.records import Choice, Plan

MADE = profile()
MISLED = truth({"svd int4": 0.5}, {0: 3.0}, -0.05)


def loss_at(bits: float, linear: bool) -> float:
    budget = parse_budget(f"{bits}bpw" + ("-linear" if linear else ""))
    return MISLED(list(plan_to_budget(MADE, X64, budget, SIZES).choices))


def size(plan: Plan, linear: bool) -> int:
    return sum(c.bytes for c in plan.choices if not linear or c.role == "linear")


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("bits", [3.0, 4.5])
def test_the_line_is_held_with_few_bytes(bits: float, linear: bool) -> None:
    """The line is what plain allocation reaches at some budget: the plan found must be about as small, or smaller."""
    line = parse_max_loss(f"{100 * loss_at(bits, linear):.9f}%")
    plan = plan_to_loss(MADE, X64, line, SIZES, MISLED, linear=linear)
    assert MISLED(list(plan.choices)) <= line.value
    budget = parse_budget(f"{bits}bpw" + ("-linear" if linear else ""))
    plain = plan_to_budget(MADE, X64, budget, SIZES)
    assert size(plan, linear) <= 1.04 * size(plain, linear)
    assert plan.budget == f"max-loss {line.text}"
    assert "the smallest that holds the line loses" in plan.notes[-1]
    check_plan(plan, LAYERS, X64, "sha256:x")


def test_a_stricter_line_is_never_smaller() -> None:
    found = [plan_to_loss(MADE, X64, parse_max_loss(f"{text}%"), SIZES, MISLED) for text in ("5", "1", "0.4")]
    sizes = [size(plan, False) for plan in found]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_measuring_is_limited() -> None:
    count = 0

    def measure(choices: list[Choice]) -> float:
        nonlocal count
        count += 1
        return MISLED(choices)

    for evaluations in (1, 4, 15):
        count = 0
        plan = plan_to_loss(MADE, X64, parse_max_loss("1%"), SIZES, measure, Search(evaluations=evaluations))
        assert count <= evaluations + 2
        assert MISLED(list(plan.choices)) <= 0.01


def test_a_line_that_the_smallest_plan_holds() -> None:
    plan = plan_to_loss(MADE, X64, parse_max_loss("50%"), SIZES, lambda choices: 0.4)
    with pytest.raises(BudgetError, match="below the floor") as caught:
        plan_to_budget(MADE, X64, parse_budget("0.01bpw"), SIZES)
    floor = parse_budget(str(caught.value).rpartition(" ")[2]).model_bytes(SIZES.parameters)
    assert plan.bytes <= floor


@pytest.mark.parametrize("loss", [0.02, float("nan")])
def test_a_line_below_the_largest_plan_is_refused(loss: float) -> None:
    with pytest.raises(PlanError, match="even the largest plan that onnx-x64 executes loses"):
        plan_to_loss(MADE, X64, parse_max_loss("1%"), SIZES, lambda choices: loss)


def test_lines_as_people_type_them() -> None:
    assert parse_max_loss("1%").value == parse_max_loss(" 0.01 ").value == 0.01
    assert parse_max_loss("0.5 %").value == 0.005
    assert str(parse_max_loss("1%")) == "max-loss 1%"
    for text in ("", "%", "1", "0", "0%", "-1%", "100%", "nan", "nan%", "1%%", "1% x", "one"):
        with pytest.raises(UsageError, match="such as 1% or 0.01"):
            parse_max_loss(text)


def test_plans_that_no_cap_of_time_allows_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest plans may be slow ones: what is held already ships then."""
    allocate = Offer.allocate
    unlimited = plan_to_loss(MADE, X64, parse_max_loss("1%"), SIZES, MISLED)

    def capped(self: Offer, *loss: Any) -> list[Choice]:
        found = allocate(self, *loss)
        if sum(c.bytes for c in found) < 1.2 * unlimited.bytes:
            raise BudgetError("no plan within the size budget takes less than 2 ms")
        return found

    monkeypatch.setattr(Offer, "allocate", capped)
    plan = plan_to_loss(MADE, X64, parse_max_loss("1%"), SIZES, MISLED)
    assert MISLED(list(plan.choices)) <= 0.01 and plan.bytes > unlimited.bytes
