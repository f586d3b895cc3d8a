"""Memory and time of a plan before there is an artifact: sums of what one weight costs a runtime, each term kept apart
so that it can be shown.

What goes in was measured on a machine (`edgec bench`, or probes of single kernels); this file only adds up. Norms,
attention scores and tokenization have no term in the time: below a few thousand tokens matrices dominate, and where
that is wrong a measured row corrects it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edgec.contraction import core_shapes, flops
from edgec.fit import contraction_of
from edgec.plan.kv_cache import CacheShape
from edgec.quantize.formats import CoreFormat, LayerFormat
from edgec.records import Choice, Plan

BUSY = 1.2
"""Runnable processes per core above which a timing says more about them than about the kernel."""


@dataclass(frozen=True)
class Rate:
    """Of one number of bits. ns: time of one multiplied weight, at the rows it was measured with [ns]. overhead:
    resident bytes per stored byte, at the peak of session creation.
    """

    ns: float
    overhead: float


@dataclass(frozen=True)
class Costs:
    """What a runtime costs on the machine that was measured.

    empty_bytes: resident, runtime imported and nothing loaded. session_bytes: what a session without weights adds.
    rates: bits → Rate. named: name of a format → Rate, where formats of equal bits have kernels of their own. rows: of
    x in one step, for which the times hold. machine: for the reader. native: the machine is of the target's class; if
    not, its times say nothing about the target. load: runnable processes per core.
    """

    empty_bytes: int
    session_bytes: int
    rates: Mapping[int, Rate]
    rows: int
    threads: int
    machine: str
    native: bool
    load: float = 0.0
    named: Mapping[str, Rate] = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        """Other work took time on the measured cores: times are upper bounds, and only those that pass count."""
        return self.load > BUSY

    def rate(self, bits: int) -> Rate:
        """The rate of the nearest measured number of bits."""
        nearest = min(self.rates, key=lambda known: (abs(math.log2(known / bits)), known))
        return self.rates[nearest]

    def rate_of(self, fmt: CoreFormat) -> Rate:
        """The rate of a format, or else of its bits."""
        return self.named.get(str(fmt)) or self.rate(fmt.bits)

    def milliseconds(self, choice: Choice) -> float:
        """Time of one layer in one step; a table is looked up, which costs next to nothing."""
        if choice.role == "embedding":
            return 0.0
        contraction = contraction_of(choice.spec, choice.shape, choice.role)
        fmt = LayerFormat.parse(choice.format)
        sizes = {core: math.prod(shape) for core, shape in core_shapes(contraction).items()}
        ns = sum(size * self.rate_of(fmt.of(core)).ns for core, size in sizes.items()) / max(1, sum(sizes.values()))
        return flops(contraction) / 2 * ns / 1e6

    def resident(self, choice: Choice) -> float:
        """Bytes in memory that a layer's stored bytes become. Tables are mapped and read in place."""
        if choice.role == "embedding" or not choice.bytes:
            return float(choice.bytes)
        return choice.bytes * self.rate_of(LayerFormat.parse(choice.format).of("backbone")).overhead


@dataclass(frozen=True)
class Facts:
    """Of one model, for one target. cache: None for an encoder. width, widest, heads, vocabulary: for activations
    [counts]; vocabulary 0 for an encoder. context: tokens of one sequence. other_bytes: what ships beside the layers.
    chunk: most tokens that the runtime reads at once; 0 for all of them.
    """

    name: str
    task: str
    parameters: int
    cache: CacheShape | None
    width: int
    widest: int
    heads: int
    vocabulary: int
    context: int
    batch: int
    other_bytes: int
    chunk: int = 0

    def activation_bytes(self) -> int:
        """Live tensors of one block at fp32 while the longest input is read, and the logits that come of it: those of
        the last token, which are all that generating needs (`edgec.runtime.layout.FIRST_LOGITS`).
        """
        whole = self.context * self.batch
        rows = min(whole, self.chunk or whole)
        block = rows * (4 * self.width + 2 * self.widest)
        scores = 0 if self.cache else 2 * self.batch * self.heads * self.context**2
        return 4 * (block + scores + self.batch * self.vocabulary)


@dataclass(frozen=True)
class Ram:
    """Bytes by cause: the runtime and its session, stored weights, what they take beyond that, KV cache, activations.
    measured: the total is a peak RSS and the parts are not known (they are all in `weights`).
    """

    runtime: float
    weights: float
    extra: float
    kv: float
    activations: float
    measured: bool = False

    @property
    def total(self) -> float:
        return self.runtime + self.weights + self.extra + self.kv + self.activations


def ram_of(plan: Plan, costs: Costs, facts: Facts, kv: float) -> Ram:
    """What a plan needs while it runs; kv: bytes of the cache in device memory."""
    resident = sum(costs.resident(c) for c in plan.choices) + plan.other_bytes
    return Ram(
        costs.empty_bytes + costs.session_bytes, plan.bytes, resident - plan.bytes, kv, facts.activation_bytes()
    )


def milliseconds_of(choices: Sequence[Choice], costs: Costs) -> float:
    """One step: a token of a causal LM's answer, or one sentence through an encoder."""
    return sum(costs.milliseconds(c) for c in choices)


def parameters_that_fit(left: float, costs: Costs, bits: int = 8) -> int:
    """How many parameters a dense model may have at so many bits when `left` bytes are for its weights [count].

    A scale per block of 32 adds half a bit per weight.
    """
    return max(0, int(left * 8 / ((bits + 0.5) * max(1.0, costs.rate(bits).overhead))))
