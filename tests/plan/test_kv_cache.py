"""The KV cache's arithmetic, to SEEDS' numbers, and where it is put."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgec.errors import UsageError
from edgec.plan.kv_cache import (
    DEVICE,
    HOST,
    NOWHERE,
    POOLED,
    SELECTIVE,
    CacheShape,
    Memory,
    arithmetic,
    decide,
    kv_bytes,
)

SEVEN_B = CacheShape(layers=32, kv_heads=32, head_dim=128)
K = 1000


def test_the_sources_own_numbers() -> None:
    whole = kv_bytes(SEVEN_B, 128 * K, 8, "fp16")
    assert whole / 1e9 == pytest.approx(537, abs=0.5)
    assert 0.1 * kv_bytes(SEVEN_B, 128 * K, 8, "int8") / 1e9 == pytest.approx(27, abs=0.5)
    found = decide(SEVEN_B, 128 * K, 8, Memory(device=40e9, host=600e9), relevance_signal=True)
    assert (found.placement, found.precision) == (SELECTIVE, "int8")
    assert found.bytes / 1e9 == pytest.approx(27, abs=0.5)
    assert arithmetic(SEVEN_B, 128 * K, 8, "fp16") == (
        "2 × 32 layers × 128000 tokens × batch 8 × 32 KV heads × 128 × 2 B (fp16)"
    )


@given(
    layers=st.integers(1, 100),
    heads=st.integers(1, 64),
    dim=st.integers(1, 256),
    tokens=st.integers(1, 10**6),
    batch=st.integers(1, 64),
)
def test_bytes_are_the_product(layers: int, heads: int, dim: int, tokens: int, batch: int) -> None:
    shape = CacheShape(layers, heads, dim)
    one = kv_bytes(shape, tokens, batch, "int8")
    assert one == 2 * layers * tokens * batch * heads * dim
    assert (kv_bytes(shape, tokens, batch, "fp16"), kv_bytes(shape, tokens, batch, "fp32")) == (2 * one, 4 * one)
    assert decide(shape, tokens, batch, Memory(device=2 * one)).placement == DEVICE


@pytest.mark.parametrize(
    ("memory", "signal", "expected"),
    [
        (Memory(538e9), False, (DEVICE, "fp16")),
        (Memory(300e9, host=1e12), True, (DEVICE, "int8")),
        (Memory(60e9, host=1e12), True, (SELECTIVE, "fp16")),
        (Memory(40e9, host=600e9), False, (HOST, "fp16")),
        (Memory(40e9, host=600e9, pooled=600e9), False, (POOLED, "fp16")),
        (Memory(40e9, host=300e9), False, (HOST, "int8")),
        (Memory(1e9, host=1e12), True, (NOWHERE, "fp16")),
        (Memory(40e9), False, (NOWHERE, "fp16")),
        (Memory(-5.0), False, (NOWHERE, "fp16")),
    ],
)
def test_placements_in_order(memory: Memory, signal: bool, expected: tuple[str, str]) -> None:
    found = decide(SEVEN_B, 128 * K, 8, memory, relevance_signal=signal)
    assert (found.placement, found.precision) == expected
    assert ("sparse" in found.reasons[0]) == signal
    if expected[0] == NOWHERE:
        assert "nothing fits" in found.reasons[-1]
        assert found.bytes == 0
    else:
        assert found.reasons[-1].endswith("fits")


def test_a_type_that_the_runtime_cannot_hold_is_shown_and_not_chosen() -> None:
    found = decide(SEVEN_B, 1 * K, 1, Memory(0.3e9), precisions=("fp32", "int8"), runs=("fp32",))
    assert found.placement == NOWHERE
    assert [(o.precision, o.fits, o.runs) for o in found.options] == [("fp32", False, True), ("int8", True, False)]
    found = decide(SEVEN_B, 1 * K, 1, Memory(0.3e9), precisions=("fp32", "int8"), runs=("fp32", "int8"))
    assert (found.placement, found.precision) == (DEVICE, "int8")
    assert "device memory at fp32: does not fit" in found.reasons


def test_far_memory_costs_its_transfer_per_step() -> None:
    found = decide(SEVEN_B, 128 * K, 8, Memory(40e9, host=600e9, pooled=600e9))
    by_place = {(o.placement, o.precision): o for o in found.options}
    host, pooled = by_place[HOST, "fp16"], by_place[POOLED, "fp16"]
    assert host.link_ms is not None
    assert pooled.link_ms is not None
    assert host.link_ms == pytest.approx(1e3 * 537e9 / 25e9, rel=1e-3)
    assert pooled.link_ms < host.link_ms
    assert by_place[DEVICE, "fp16"].link_ms is None


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="KV precision 'int3'; known: fp32, fp16, int8"):
        kv_bytes(SEVEN_B, 1, 1, "int3")
    with pytest.raises(UsageError, match="at least one token"):
        kv_bytes(SEVEN_B, 0, 1, "fp16")
