"""Hulls and allocation against brute force on small instances."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec.errors import BudgetError, PlanError
from edgec.plan.allocation import Option, allocate, hull, layer_items, pick
from edgec.records import Choice, Spec

DENSE = Spec("dense")


def choice(
    layer: str, size: int, loss: float | None, spec: Spec = DENSE, fmt: str = "int4-b32", **more: object
) -> Choice:
    return Choice(layer, "linear", (8, 8), spec, fmt, size, 0, loss=loss, **more)  # type: ignore[arg-type]


def option(size: int, loss: float) -> Option:
    return Option((choice("x", size, loss),))


points = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=6)
instances = st.lists(points, min_size=1, max_size=4)


def items_of(instance: list[list[tuple[int, int]]]) -> list[list[Option]]:
    return [
        [Option((choice(f"layer{i}", size, float(loss)),)) for size, loss in options]
        for i, options in enumerate(instance)
    ]


def best(items: list[list[Option]], budget: float) -> float:
    plans = [p for p in product(*items) if sum(o.bytes for o in p) <= budget]
    return min((sum(o.loss for o in p) for p in plans), default=math.inf)


@given(points)
def test_the_hull_is_convex_and_below_everything(values: list[tuple[int, int]]) -> None:
    options = [option(size, loss) for size, loss in values]
    kept = hull(options)
    assert kept
    assert {(o.bytes, o.loss) for o in kept} <= set(values)
    assert kept[0].bytes == min(o.bytes for o in options)
    assert kept[-1].loss == min(o.loss for o in options)
    slopes = [(b.loss - a.loss) / (b.bytes - a.bytes) for a, b in zip(kept, kept[1:], strict=False)]
    assert slopes == sorted(slopes)
    assert len(set(slopes)) == len(slopes)
    assert all(slope < 0 for slope in slopes)
    for price in (0.0, 0.1, 0.5, 1.0, 3.0, 100.0):  # whatever a byte costs, the best option is on the hull
        cheapest = min(o.loss + price * o.bytes for o in options)
        assert min(o.loss + price * o.bytes for o in kept) == pytest.approx(cheapest)


@settings(max_examples=150, deadline=None)
@given(instance=instances, share=st.floats(0, 1.2))
def test_allocation_is_feasible_and_near_the_optimum(instance: list[list[tuple[int, int]]], share: float) -> None:
    """Within one hull step of the best plan there is, and exact where the budget is spent by whole steps."""
    items = items_of(instance)
    floor = sum(min(o.bytes for o in options) for options in items)
    top = sum(max(o.bytes for o in options) for options in items)
    budget = floor + share * (top - floor)
    chosen = allocate(items, budget)
    assert [c.layer for c in chosen] == [f"layer{i}" for i in range(len(items))]
    spent, loss = sum(c.bytes for c in chosen), sum(c.loss or 0.0 for c in chosen)
    assert spent <= budget
    steps = [a.loss - b.loss for options in items for a, b in zip(hull(options), hull(options)[1:], strict=False)]
    assert best(items, budget) <= loss + 1e-9 <= best(items, budget) + max(steps, default=0.0) + 2e-9
    if budget >= top:
        assert loss == sum(min(o.loss for o in options) for options in items)


@settings(max_examples=100, deadline=None)
@given(instance=instances, stop=st.integers(0, 20))
def test_allocation_is_exact_along_the_hulls(instance: list[list[tuple[int, int]]], stop: int) -> None:
    items = items_of(instance)
    hulls = [hull(options) for options in items]
    steps = sorted(
        ((b.loss - a.loss) / (b.bytes - a.bytes), b.bytes - a.bytes)
        for h in hulls
        for a, b in zip(h, h[1:], strict=False)
    )
    budget = sum(h[0].bytes for h in hulls) + sum(size for _, size in steps[:stop])
    loss = sum(c.loss or 0.0 for c in allocate(items, budget))
    assert loss == pytest.approx(best(items, budget))


def test_below_the_floor_names_it() -> None:
    items = [[option(3_000_000, 1.0), option(5_000_000, 0.0)], [option(1_000_000, 1.0)]]
    with pytest.raises(BudgetError, match=r"at least 4\.00 MB .* leaves 3\.90 MB"):
        allocate(items, 3.9e6)
    with pytest.raises(PlanError, match="nothing to plan"):
        allocate([], 100)


def test_no_profile_falls_back_to_squared_errors() -> None:
    assert Option((choice("x", 1, None, error=0.5), choice("y", 1, 0.5, error=9.0))).loss == 0.75


def test_tied_items_are_paid_once() -> None:
    """A dense head in its table's format costs nothing; a factored one may go with any table."""
    heads = [
        choice("head", 100, 0.1, fmt="int8-b32"),
        choice("head", 50, 0.5, fmt="int4-b32"),
        choice("head", 10, 0.9, Spec("svd", (4,)), "int4-b32"),
    ]
    tables = [choice("table", 100, 0.1, fmt="int8-b32"), choice("table", 50, 0.4, fmt="int4-b32")]
    factored = choice("table", 40, 0.5, Spec("table_svd", (4,)), "int4-b32")  # no dense head can read its rows
    for found in layer_items([[*tables, factored], heads], [("head", "table")])[0]:
        if factored in found.choices:
            assert found.choices[0].spec.kind == "svd"
    other = [choice("other", 7, 0.0)]
    items = layer_items([tables, other, heads], [("head", "table")])
    assert sorted((o.bytes, round(o.loss, 3)) for o in items[0]) == [(50, 0.9), (60, 1.3), (100, 0.2), (110, 1.0)]
    assert [o.choices[0].layer for o in items[1]] == ["other"]
    by_layer = {c.layer: c for c in allocate(items, 200)}
    assert (by_layer["head"].bytes, by_layer["head"].format) == (0, "int8-b32")
    assert by_layer["table"].bytes == 100
    assert sum(c.bytes for c in allocate(items, 106)) <= 106


def test_the_measured_best_is_picked() -> None:
    plans = [(name, [choice(name, 1, 0.0)]) for name in ("a", "b", "c", "d")]
    losses = {"a": math.nan, "b": 0.3, "c": 0.2, "d": 0.2}
    name, chosen, measured = pick(plans, lambda choices: losses[choices[0].layer])
    assert (name, chosen[0].layer) == ("c", "c")
    assert measured["b"] == 0.3
    for broken in (math.nan, math.inf):
        with pytest.raises(PlanError, match="no plan gives a finite loss"):
            pick(plans, lambda choices, broken=broken: broken)  # type: ignore[misc]
