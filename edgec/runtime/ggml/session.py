"""A loaded network with its cache: prefill in chunks, then token by token, graphs reused.

Attention reads the cache in steps of `BUCKET` positions; one graph serves a whole step, and per token only the id, its
place and one element of the mask are written. Graphs for chunks are built when a chunk of that size comes. The cache
is made for what a run needs and grows by making a new one: a context of 131,072 positions is not paid for by a
question of twenty words.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgec.errors import NumericsError, UsageError
from edgec.runtime.ggml.bundles import PAIR
from edgec.runtime.ggml.forward import Cache, Forward, Inputs
from edgec.runtime.ggml.library import F16, F32, I32, I64, Q8_0
from edgec.runtime.ggml.network import TABLE, Network
from edgec.runtime.ggml.ports import Input, Output
from edgec.runtime.ggml.tensors import Allocator, Buffer, Context, Device, Tensor
from edgec.runtime.ggml.weights import Weights
from edgec.runtime.interfaces import Floats

BUCKET = 256
"""Positions by which the part of the cache that attention reads grows."""
CHUNK = 128
"""Most tokens of one prefill graph: larger ones were no faster, and their activations take memory."""
_KEPT_GRAPHS = 6
CACHE_KINDS = {"f16": F16, "q8_0": Q8_0, "f32": F32}


@dataclass(frozen=True)
class _Built:
    """A graph with its memory. logits: to be read from, None where they are computed in place (or not at all).
    generation: of the allocator that placed it.
    """

    context: Context
    graph: int
    logits: Tensor | None
    generation: int


class _Feed:
    """Inputs of graphs of `tokens` tokens, in memory of their own, so that their contents stay."""

    def __init__(
        self, device: Device, network: Network, weights: Weights, tokens: int, capacity: int, flash: bool
    ) -> None:
        self.weights, self.tokens, self.window = weights, tokens, network.config.window
        self._context = context = Context(device.lib, 16)
        width = network.config.kv_width
        table = None if TABLE in network.programs else weights.header.tensors[f"{TABLE}.weight"]

        def make(kind: int, dtype: DTypeLike, *ne: int) -> Input:
            return Input(device, context, kind, dtype, *ne)

        mask: tuple[int, DTypeLike] = (F16, np.float16) if flash else (F32, np.float32)
        self.ids = make(I32, np.int32, tokens)
        self.positions = make(I32, np.int32, tokens)
        self.places = make(I64, np.int64, tokens)
        self.mask = make(*mask, tokens * capacity)
        self.outputs = make(I32, np.int32, tokens)
        self.local_mask = make(*mask, tokens * capacity) if self.window else None
        self.value_places = None if flash else make(I64, np.int64, tokens * width)
        self.rows = make(table.type, np.uint8, network.config.width, tokens) if table else None
        self.order = make(I32, np.int32, tokens) if table else None
        self.experts = make(I32, np.int32, PAIR, 1) if tokens == 1 else None
        self._memory = None if device.on_cpu else device.allocate(context, "the inputs")
        for numbers in (self.order, self.experts):
            if numbers is not None:
                numbers.values[:] = np.arange(len(numbers.values))
                numbers.send()
        self._strides = np.arange(width, dtype=np.int64) * capacity
        self._seen: tuple[int, int] | None = None
        made = {name: getattr(self, name) for name in _INPUTS}
        self.inputs = Inputs(**{name: one and one.tensor for name, one in made.items()})

    def fill(self, ids: Sequence[int] | NDArray[np.int32], start: int, seen: int) -> None:
        """Tokens at positions start … of which attention reads `seen` cache positions."""
        if self.rows is None:
            self.ids.values[:] = ids
            self.ids.send()
        else:
            self.weights.read_rows(f"{TABLE}.weight", ids, self.rows.values)
            self.rows.send()
        if self.tokens == 1 and self._seen == (start - 1, seen):
            self._step(start)
        else:
            self._begin(start, seen)
        self._seen = (start, seen)

    def choose(self, first: int) -> None:
        """The logits of the tokens from `first` on are wanted."""
        count = self.tokens - first
        self.outputs.values[:count] = np.arange(first, self.tokens)
        self.outputs.send(0, count)

    def _step(self, position: int) -> None:
        """The token after the last one: one more position of the mask is open, and one leaves the window."""
        self.positions.values[0] = self.places.values[0] = position
        self.positions.send()
        self.places.send()
        if self.value_places is not None:
            self.value_places.values += 1
            self.value_places.send()
        _set(self.mask, position, 0)
        if self.local_mask is not None:
            _set(self.local_mask, position, 0)
            if position >= self.window:
                _set(self.local_mask, position - self.window, -np.inf)

    def _begin(self, start: int, seen: int) -> None:
        positions = np.arange(start, start + self.tokens, dtype=np.int64)
        self.positions.values[:] = self.places.values[:] = positions
        self.positions.send()
        self.places.send()
        if self.value_places is not None:
            self.value_places.values.reshape(self.tokens, -1)[:] = positions[:, None] + self._strides
            self.value_places.send()
        keys = np.arange(seen)[None, :]
        hidden = keys > positions[:, None]
        _cover(self.mask, hidden)
        if self.local_mask is not None:
            _cover(self.local_mask, hidden | (positions[:, None] - keys >= self.window))


_INPUTS = tuple(field.name for field in fields(Inputs))


def _set(mask: Input, place: int, value: float) -> None:
    mask.values[place] = value
    mask.send(place, place + 1)


def _cover(mask: Input, hidden: NDArray[np.bool_]) -> None:
    """hidden [T, positions]: what attention must not see."""
    flat = hidden.reshape(-1)
    mask.values[: flat.size] = np.where(flat, -np.inf, 0.0)
    mask.send(0, flat.size)


class Session:
    """One sequence at a time. After an error its cache holds nothing. run: counts the sequences."""

    def __init__(
        self,
        device: Device,
        network: Network,
        weights: Weights,
        *,
        flash: bool = True,
        cache: str = "f16",
        chunk: int = CHUNK,
    ) -> None:
        """cache: "f16", "q8_0" (half the bytes; with flash attention only) or "f32" (to verify). chunk: most tokens of
        one graph. Raises UsageError.
        """
        if cache not in CACHE_KINDS or (cache == "q8_0" and not flash):
            raise UsageError(f"the KV cache can be {', '.join(CACHE_KINDS)}, q8_0 with flash attention; got {cache!r}")
        if cache == "q8_0" and network.config.head % 32:
            raise UsageError(f"a q8_0 KV cache needs heads of a multiple of 32, this model has {network.config.head}")
        if chunk < 1:
            raise UsageError(f"chunk must be at least 1 token, got {chunk}")
        self.device, self.network, self.weights = device, network, weights
        self.flash, self.kind, self.chunk = flash, CACHE_KINDS[cache], chunk
        self.position, self.run = 0, 0
        self._cache: Cache | None = None
        self._owned: tuple[Context, Buffer] | None = None
        self._feeds: dict[int, _Feed] = {}
        self._graphs: OrderedDict[tuple[int, int, int], _Built] = OrderedDict()
        self._allocator = Allocator(device)
        self._logits = Output(device, network.config.vocab)

    @property
    def cache_bytes(self) -> int:
        return self._owned[1].nbytes if self._owned else 0

    def start(self, positions: int) -> None:
        """Forget everything and make room for this many positions."""
        self.run += 1
        self.position = 0
        capacity = -(-positions // BUCKET) * BUCKET
        if self._cache is not None and self._cache.capacity >= capacity:
            return
        self._graphs.clear()
        self._feeds.clear()
        self._cache = self._owned = None
        config = self.network.config
        context = Context(self.device.lib, 2 * config.layers)
        keys = tuple(context.new(self.kind, config.kv_width, capacity) for _ in range(config.layers))
        shape = (config.kv_width, capacity) if self.flash else (capacity, config.kv_width)
        values = tuple(context.new(self.kind, *shape) for _ in range(config.layers))
        buffer = self.device.allocate(context, f"a KV cache of {capacity} positions")
        buffer.clear()  # masked positions are multiplied by zero, and NaN times zero is NaN
        self._owned, self._cache = (context, buffer), Cache(keys, values, capacity, self.flash)

    def prefill(self, ids: Sequence[int]) -> Floats:
        """Tokens at the next positions → logits [V] of the last one (a view that the next call overwrites)."""
        whole = np.asarray(ids, np.int32)
        for at in range(0, len(whole), self.chunk):
            part = whole[at : at + self.chunk]
            final = at + len(part) == len(whole)
            self._run(part, self._logits.values if final else None)
        self.weights.forget_rows()
        return self._checked(self._logits.values)

    def every(self, ids: Sequence[int]) -> Floats:
        """Tokens at the next positions → logits [T, V] of all of them."""
        whole = np.asarray(ids, np.int32)
        found = np.empty((len(whole), self.network.config.vocab), np.float32)
        for at in range(0, len(whole), self.chunk):
            part = whole[at : at + self.chunk]
            self._run(part, found[at : at + len(part)])
        self.weights.forget_rows()
        return self._checked(found)

    def step(self, token: int) -> Floats:
        """One token at the next position → logits [V] (a view that the next call overwrites)."""
        self._run((token,), self._logits.values)
        return self._logits.values

    def _run(self, ids: Sequence[int] | NDArray[np.int32], out: Floats | None) -> None:
        tokens, start = len(ids), self.position
        cache = self._cache
        if cache is None or start + tokens > cache.capacity:
            raise UsageError(f"{start + tokens} positions; the session was started for less")
        seen = -(-(start + tokens) // BUCKET) * BUCKET
        outputs = 0 if out is None else max(1, out.size // self.network.config.vocab)
        feed = self._feeds.get(tokens)
        if feed is None:
            feed = _Feed(self.device, self.network, self.weights, tokens, cache.capacity, self.flash)
            if len(self._feeds) >= _KEPT_GRAPHS:
                self._forget()
            self._feeds[tokens] = feed
        built = self._graph(feed, tokens, seen, outputs, cache)
        feed.fill(ids, start, seen)
        if 0 < outputs < tokens:
            feed.choose(tokens - outputs)
        self.position = 0  # until the cache is whole again
        self.device.compute(built.graph)
        self.position = start + tokens
        if out is None:
            return
        if built.logits is not None:
            self.device.read(built.logits, out)
        elif out is not self._logits.values:  # the graph put a single row there
            out[:] = self._logits.values

    def _graph(self, feed: _Feed, tokens: int, seen: int, outputs: int, cache: Cache) -> _Built:
        key = (tokens, seen, outputs)
        built = self._graphs.get(key)
        if built is not None and built.generation == self._allocator.generation:
            self._graphs.move_to_end(key)
            return built
        nodes = self.network.nodes()
        context = Context(self.device.lib, nodes, nodes)
        forward = Forward(self.device.lib, self.network, self.weights, context, tokens, seen)
        logits = forward.build(feed.inputs, cache, outputs)
        self.device.require(forward.graph)
        if logits is not None and outputs == 1 and self._logits.take(logits):
            logits = None
        self._allocator.place(forward.graph)
        built = _Built(context, forward.graph, logits, self._allocator.generation)
        self._graphs[key] = built
        while len(self._graphs) > _KEPT_GRAPHS:
            self._graphs.popitem(last=False)
        return built

    def _forget(self) -> None:
        """Graphs and their inputs, all of them: prompts of many lengths came."""
        self._graphs.clear()
        self._feeds.clear()

    def _checked(self, logits: Floats) -> Floats:
        if not np.isfinite(logits).all():
            raise NumericsError("the model answered NaN or Inf; its file is damaged")
        return logits
