"""Node 3 of the decision: where a causal LM's keys and values live, in which precision, with the arithmetic shown.

A cache holds, for every token of every sequence, a key and a value per layer:

    bytes = 2 × layers × tokens × batch × kv_heads × head_dim × bytes per number

(kv_heads × head_dim is the hidden size where every head has its own keys). With dense attention every decode step
reads all of it, so a slower memory costs its transfer time per token; with sparse attention whose relevance signal
says beforehand which tokens matter, only those need to be near. Guessing relevance from attention weights of a model
that was trained dense was turned down: that is a change of the model, not a placement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgec.errors import UsageError

BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
"""Bytes per number; int8 scales are one per row of head_dim or fewer and are left out [bytes]."""

DEVICE, POOLED, HOST, SELECTIVE, NOWHERE = "device memory", "pooled (CXL)", "host offload", "selective fetch", "nowhere"

KEPT_SHARE = 0.1
"""Share of the tokens that selective fetch keeps near the compute units, as SEEDS' arithmetic has it."""

LINK_GB_S = {HOST: 25.0, POOLED: 50.0}
"""Assumed bandwidth of the way to another memory [GB/s]: PCIe 4.0 x16 and CXL 2.0 x16 as they sustain; not measured."""


@dataclass(frozen=True)
class CacheShape:
    """Of one model [counts]."""

    layers: int
    kv_heads: int
    head_dim: int

    def values(self, tokens: int, batch: int) -> int:
        """Numbers in a cache of so many tokens per sequence."""
        if tokens < 1 or batch < 1:
            raise UsageError(f"a cache needs at least one token and one sequence, got {tokens} and {batch}")
        return 2 * self.layers * tokens * batch * self.kv_heads * self.head_dim


def kv_bytes(shape: CacheShape, tokens: int, batch: int, precision: str) -> int:
    """Bytes of the whole cache. Raises UsageError for a precision other than fp32, fp16, int8."""
    if precision not in BYTES:
        raise UsageError(f"KV precision {precision!r}; known: {', '.join(BYTES)}")
    return shape.values(tokens, batch) * BYTES[precision]


def arithmetic(shape: CacheShape, tokens: int, batch: int, precision: str) -> str:
    """The product spelled out: "2 × 32 layers × … × 2 B = 549.76 GB"."""
    return (
        f"2 × {shape.layers} layers × {tokens} tokens × batch {batch} × {shape.kv_heads} KV heads × {shape.head_dim} "
        f"× {BYTES[precision]} B ({precision})"
    )


@dataclass(frozen=True)
class Memory:
    """What is free for the cache, after weights and runtime [bytes]. host, pooled: 0 where there is none beside the
    device's own (on a CPU, device and host are one).
    """

    device: float
    host: float = 0.0
    pooled: float = 0.0


@dataclass(frozen=True)
class CacheOption:
    """One way to keep the cache. near, far: bytes in device memory and elsewhere. link_ms: assumed transfer time per
    decode step, None where nothing moves. fits: both parts have room. runs: the target's runtime can hold this type.
    """

    placement: str
    precision: str
    near: float
    far: float
    link_ms: float | None
    fits: bool
    runs: bool


@dataclass(frozen=True)
class CacheDecision:
    """placement, precision: what is chosen; `NOWHERE` when nothing fits. bytes: in device memory. reasons: why, in
    order. options: everything that was looked at. arithmetic: of the chosen precision, for the whole cache.
    """

    placement: str
    precision: str
    bytes: float
    whole_bytes: float
    arithmetic: str
    reasons: tuple[str, ...]
    options: tuple[CacheOption, ...]


def decide(
    shape: CacheShape,
    tokens: int,
    batch: int,
    memory: Memory,
    *,
    precisions: tuple[str, ...] = ("fp16", "int8"),
    runs: tuple[str, ...] = ("fp16", "int8"),
    relevance_signal: bool = False,
) -> CacheDecision:
    """Where the cache goes. precisions: the types to consider, best first; runs: those that the runtime can hold.

    Order of preference: device memory at the best type, then at a smaller one; then, with a relevance signal,
    selective fetch from the host; without one, pooled memory before host offload, since dense attention reads it all.
    """
    options = _options(shape, tokens, batch, memory, precisions, runs, relevance_signal)
    whole = {p: kv_bytes(shape, tokens, batch, p) for p in precisions}
    reasons = [
        "attention is sparse and says beforehand which tokens matter: the rest may stay far away"
        if relevance_signal
        else "attention is dense: every decode step reads the whole cache"
    ]
    chosen = next((o for o in options if o.fits and o.runs), None)
    if chosen is None:
        least = min((o.near for o in options if o.runs), default=min(whole.values()))
        reasons.append(
            f"nothing fits: {least / 1e9:.3g} GB near the compute units at least, {max(memory.device, 0) / 1e9:.3g} GB "
            "left. Shorten --context, lower --batch, or raise --ram"
        )
        best = precisions[0]
        return CacheDecision(
            NOWHERE, best, 0.0, whole[best], arithmetic(shape, tokens, batch, best), tuple(reasons), tuple(options)
        )
    for option in options[: options.index(chosen)]:
        reasons.append(
            f"{option.placement} at {option.precision}: "
            + ("the target's runtime does not hold this type" if not option.runs else "does not fit")
        )
    reasons.append(f"{chosen.placement} at {chosen.precision} fits")
    return CacheDecision(
        chosen.placement,
        chosen.precision,
        chosen.near,
        whole[chosen.precision],
        arithmetic(shape, tokens, batch, chosen.precision),
        tuple(reasons),
        tuple(options),
    )


def _options(
    shape: CacheShape,
    tokens: int,
    batch: int,
    memory: Memory,
    precisions: tuple[str, ...],
    runs: tuple[str, ...],
    relevance_signal: bool,
) -> list[CacheOption]:
    """In order of preference; only placements that exist for this attention and this machine."""
    whole: Mapping[str, int] = {p: kv_bytes(shape, tokens, batch, p) for p in precisions}
    found = [CacheOption(DEVICE, p, whole[p], 0, None, whole[p] <= memory.device, p in runs) for p in precisions]
    elsewhere = ((POOLED, memory.pooled), (HOST, memory.host))
    if relevance_signal and memory.host > 0:
        for p in precisions:
            near = KEPT_SHARE * whole[p]
            fits = near <= memory.device and whole[p] <= memory.host
            # What is fetched per step is at most what is kept: the kept tokens change from step to step.
            link = 1e3 * near / (LINK_GB_S[HOST] * 1e9)
            found.append(CacheOption(SELECTIVE, p, near, whole[p], link, fits, p in runs))
    for place, room in elsewhere:
        if room <= 0:
            continue
        for p in precisions:
            # One layer's keys and values at a time are in device memory, twice to overlap copy and product.
            near = 2 * whole[p] / shape.layers
            link = 1e3 * whole[p] / (LINK_GB_S[place] * 1e9)
            found.append(
                CacheOption(place, p, near, whole[p], link, near <= memory.device and whole[p] <= room, p in runs)
            )
    return found
