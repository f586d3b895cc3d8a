"""Annealing: seeded, within its limits and the budget, and kept only where a second text agrees."""

from __future__ import annotations

import pytest
from landscapes_for_tests import SIZES, X64, profile, truth

from edgec.plan.anneal import anneal
from edgec.plan.budget import parse_budget
from edgec.plan.offer import Offer
from edgec.plan.refine import Found, Ledger, Search, key_of, refine
from edgec.records import Choice

MISLED = truth({"svd int4": 0.3}, {0: 5.0, 2: 0.3})
OFFER = Offer.of(profile().layers, X64, parse_budget("3bpw-linear"), SIZES)


def annealed(confirm: object = MISLED, search: Search | None = None) -> tuple[Found, Found, str, Ledger]:
    """From a plan that nothing has improved yet, so that there is something to find."""
    ledger = Ledger(MISLED)
    start = refine(OFFER, [("allocated", OFFER.allocate())], ledger, Search("none"))
    search = search or Search("anneal", evaluations=40, seed=3)
    found, note = anneal(OFFER, start, ledger, search, confirm)  # type: ignore[arg-type]
    return start, found, note, ledger


def test_it_finds_a_better_plan_within_the_budget() -> None:
    start, found, note, ledger = annealed()
    assert found.loss < start.loss
    assert MISLED(found.choices) == found.loss
    assert OFFER.fits(found.choices)
    assert ledger.count <= 1 + 40
    assert note.startswith("annealing: ")
    assert note.endswith("so it was kept")


def test_the_second_text_has_the_last_word() -> None:
    start, found, note, _ = annealed(lambda choices: 1.0)
    assert found == start
    assert note.endswith("so it was discarded")
    start, found, note, _ = annealed(lambda choices: float("nan"))
    assert found == start


def test_a_seed_is_a_plan() -> None:
    plans = [annealed(search=Search("anneal", evaluations=15, seed=seed))[3].records for seed in (1, 1, 2)]
    keys = [[key_of(choices) for choices, _ in records] for records in plans]
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]


def test_a_time_limit_ends_it() -> None:
    now = 0.0

    def evaluate(choices: list[Choice]) -> float:
        nonlocal now
        now += 1.0
        return MISLED(choices)

    ledger = Ledger(evaluate, clock=lambda: now)
    start = refine(OFFER, [("allocated", OFFER.allocate())], ledger, Search("none"))
    anneal(OFFER, start, ledger, Search("anneal", evaluations=1000, seconds=6.5), MISLED)
    assert ledger.count <= 1 + 7


def test_where_nothing_is_better_the_start_stays() -> None:
    ledger = Ledger(lambda choices: 1.0)
    start = refine(OFFER, [("allocated", OFFER.allocate())], ledger, Search("none"))
    found, note = anneal(OFFER, start, ledger, Search("anneal", evaluations=5), lambda choices: pytest.fail("asked"))
    assert found == start
    assert "none better" in note
