"""Budgets as people type them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgec.errors import UsageError
from edgec.plan.budget import parse_budget, parse_time


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("12MB", "size", 12e6),
        ("12 mb", "size", 12e6),
        ("1.5GB", "size", 1.5e9),
        ("512KiB", "size", 512 * 1024),
        ("2MiB", "size", 2 * 1024**2),
        ("0.3", "ratio", 0.3),
        ("2", "ratio", 2.0),
        (" 1e-1 ", "ratio", 0.1),
        ("4bpw", "total", 4.0),
        ("4.5BPW", "total", 4.5),
        ("4bpw-linear", "linear", 4.0),
        ("3.25bpw-linear", "linear", 3.25),
    ],
)
def test_what_is_understood(text: str, kind: str, value: float) -> None:
    budget = parse_budget(text)
    assert (budget.kind, budget.value) == (kind, pytest.approx(value))
    assert str(budget) == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MB",
        "12",
        "2.1",
        "12TB",
        "-1MB",
        "0",
        "0bpw",
        "-0.3",
        "nan",
        "inf",
        "1e400",
        "4bp",
        "4 bpw linear",
        "50%",
        "0x1",
    ],
)
def test_what_is_not(text: str) -> None:
    """A bare 12 is no ratio that anybody means: it lacks its unit."""
    with pytest.raises(UsageError, match=r"expected a size \(12MB\)"):
        parse_budget(text)


def test_what_budgets_leave_to_the_model() -> None:
    assert parse_budget("12MB").model_bytes(10**6, 500_000) == 11.5e6
    assert parse_budget("0.25").model_bytes(10**6) == 0.5e6
    assert parse_budget("4bpw").model_bytes(10**6) == 0.5e6
    assert parse_budget("4bpw-linear").model_bytes(10**6) == math.inf
    assert parse_budget("4bpw-linear").linear_bytes(10**6) == 0.5e6
    assert parse_budget("4bpw").linear_bytes(10**6) == math.inf


@given(
    kind=st.sampled_from(["12MB", "0.3", "4bpw", "4bpw-linear"]),
    wanted=st.integers(10**4, 10**10),
    parameters=st.integers(10**5, 10**10),
    files=st.integers(0, 10**7),
)
def test_the_floor_that_is_named_is_enough(kind: str, wanted: int, parameters: int, files: int) -> None:
    try:
        named = parse_budget(parse_budget(kind).raised_to(wanted, parameters, files))
    except UsageError:  # a ratio beyond fp32: no such model
        assert wanted > 3.9 * parameters
        return
    leaves = named.linear_bytes(parameters) if named.kind == "linear" else named.model_bytes(parameters, files)
    assert leaves >= wanted - 1e-6 * wanted


@pytest.mark.parametrize(
    ("text", "ms"), [("5ms", 5), ("30MS", 30), ("0.5 s", 500), ("5", None), ("ms", None), ("0ms", None), ("-1ms", None)]
)
def test_times_as_people_type_them(text: str, ms: float | None) -> None:
    if ms is None:
        with pytest.raises(UsageError, match=r"--max-latency .*expected a time, for example 30ms or 0\.5s"):
            parse_time(text, "--max-latency")
    else:
        assert parse_time(text, "--max-latency") == ms
