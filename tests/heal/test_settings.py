from __future__ import annotations

import pytest

from edgec.errors import UsageError
from edgec.heal.settings import parse_heal


@pytest.mark.parametrize(
    ("text", "mode", "amount"),
    [
        ("off", "off", 0),
        ("10min", "seconds", 600),
        ("90s", "seconds", 90),
        ("1.5min", "seconds", 90),
        ("300steps", "steps", 300),
    ],
)
def test_what_people_type(text: str, mode: str, amount: float) -> None:
    found = parse_heal(text)
    assert (found.mode, found.amount, str(found)) == (mode, amount, text)


REFUSED = ("", "10", "-5s", "0min", "1.5steps", "long", "10 hours", "infs", "10min; rm", "9" * 400 + "steps")


@pytest.mark.parametrize("text", REFUSED)
def test_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match="10min"):
        parse_heal(text)


def test_unknown_method() -> None:
    with pytest.raises(UsageError, match="lora"):
        parse_heal("10min", method="magic")


def test_a_share_of_steps_is_whole() -> None:
    assert parse_heal("25steps").shortened(0.1).amount == 2
    assert parse_heal("1steps").shortened(0.1).amount == 1
    assert parse_heal("100s").shortened(0.1).amount == pytest.approx(10)
