"""One graph: token ids to logits, or only to keys and values in the cache.

Operations and their order are llama.cpp's (`src/models/*.cpp`, `llama-graph.cpp`), so that the logits of a dense file
are bit for bit its own. Where a layer is factored, its product is a contraction instead of one `mul_mat`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from edgec.runtime.ggml.library import PREC_F32, Library
from edgec.runtime.ggml.network import ROPE_FREQS, SECONDS, TABLE, Network
from edgec.runtime.ggml.ops import NamedCores, lower
from edgec.runtime.ggml.tensors import Context, Tensor, kind_of, padded, sizes, strides
from edgec.runtime.ggml.weights import Weights


@dataclass(frozen=True)
class Inputs:
    """What a graph reads.

    ids, positions [T] int32; places [T] int64: where in the cache. mask, local_mask: flat, [T · positions] F16 or F32
    (0 or −inf). value_places: [T · kv width] int64, where values lie transposed. outputs [n] int32: whose logits.
    rows: (width, T), the tokens' rows of a table that is one matrix, as stored; order: 0 … T − 1 as int32. experts: of
    one token, (2, 1): 0 and 1 as int32.
    """

    ids: Tensor
    positions: Tensor
    places: Tensor
    mask: Tensor
    outputs: Tensor
    local_mask: Tensor | None = None
    value_places: Tensor | None = None
    rows: Tensor | None = None
    order: Tensor | None = None
    experts: Tensor | None = None


@dataclass(frozen=True)
class Cache:
    """keys, values: one tensor per block, (kv width, capacity); values transposed without flash attention."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    capacity: int
    flash: bool


class Forward:
    """Builds one graph into a context. tokens: how many at once; seen: cache positions that attention reads."""

    def __init__(
        self, lib: Library, network: Network, weights: Weights, context: Context, tokens: int, seen: int
    ) -> None:
        self.lib, self.network, self.config, self.weights = lib, network, network.config, weights
        self.context, self.tokens, self.seen = context, tokens, seen
        self.graph = context.graph()

    def build(self, inputs: Inputs, cache: Cache, outputs: int) -> Tensor | None:
        """Expands the graph. outputs: how many tokens' logits (0: none, only the cache is filled; then None)."""
        c = self.config
        x = self._look_up(inputs)
        if c.gemma:
            x = self._node("scale", x, math.sqrt(c.width))
        for layer in range(c.layers):
            last = layer == c.layers - 1
            attended = self._attention(
                layer, self._norm(x, f"blk.{layer}.attn_norm"), inputs, cache, last and not outputs
            )
            if attended is None:
                return None
            if last and outputs < self.tokens:
                chosen = self._node("view_1d", inputs.outputs, outputs, 0)
                attended, x = self._node("get_rows", attended, chosen), self._node("get_rows", x, chosen)
            if c.post_norms:
                attended = self._norm(attended, f"blk.{layer}.post_attention_norm")
            x = self._node("add", attended, x)
            fed = self._feed_forward(layer, self._norm(x, f"blk.{layer}.ffn_norm"), inputs)
            if c.post_norms:
                fed = self._norm(fed, f"blk.{layer}.post_ffw_norm")
            x = self._node("add", fed, x)
        logits = self._linear(self.network.head, self._norm(x, "output_norm"))
        if c.final_cap:
            capped = self._node("tanh", self._node("scale", logits, 1 / c.final_cap))
            logits = self._node("scale", capped, c.final_cap)
        self.lib.set_output(logits)
        self.lib.build_forward_expand(self.graph, logits)
        return logits

    def _look_up(self, inputs: Inputs) -> Tensor:
        if TABLE in self.network.programs:
            return self._contract(TABLE, inputs.ids, self.tokens)
        assert inputs.rows is not None and inputs.order is not None
        return self._node("get_rows", inputs.rows, inputs.order)

    def _attention(self, layer: int, x: Tensor, inputs: Inputs, cache: Cache, fill_only: bool) -> Tensor | None:
        c, lib, name = self.config, self.lib, f"blk.{layer}."
        begun = self._begin(f"{name}attn", x)
        query = self._heads(self._linear(f"{name}attn_q", x, begun), c.heads)
        key = self._heads(self._linear(f"{name}attn_k", x, begun), c.kv_heads)
        value = self._heads(self._linear(f"{name}attn_v", x, begun), c.kv_heads)
        if c.normed_heads:
            query, key = self._norm(query, f"{name}attn_q_norm"), self._norm(key, f"{name}attn_k_norm")
        local = c.local(layer)
        query, key = self._rotate(query, inputs, local), self._rotate(key, inputs, local)
        scale = c.attention_scale
        if c.gemma:
            query, scale = self._node("scale", query, scale), 1.0
        for tensor in (query, value, key):
            lib.build_forward_expand(self.graph, tensor)
        self._store(cache, layer, key, value, inputs)
        if fill_only:
            return None
        keys, values = self._stored(cache, layer)
        mask_source = inputs.local_mask if local else inputs.mask
        assert mask_source is not None
        mask_row = self.seen * (2 if cache.flash else 4)
        mask = self._node("view_2d", mask_source, self.seen, self.tokens, mask_row, 0)
        query = self._node("permute", query, 0, 2, 1, 3)
        if cache.flash:
            y = self._node("flash_attn_ext", query, keys, values, mask, scale, 0.0, c.attention_cap)
            lib.prec_set_acc(y, PREC_F32)
            y = self._sized(y, c.heads * c.head, self.tokens)
        else:
            scores = self._node("mul_mat", keys, query)
            lib.prec_set_acc(scores, PREC_F32)
            if c.attention_cap:
                scores = self._node("tanh", self._node("scale", scores, 1 / c.attention_cap))
                scores = self._node("scale", scores, c.attention_cap)
            scores = self._node("soft_max_ext", scores, mask, scale, 0.0)
            y = self._node("permute", self._node("mul_mat", values, scores), 0, 2, 1, 3)
            y = self._node("cont_2d", y, c.heads * c.head, self.tokens)
        lib.build_forward_expand(self.graph, y)
        return self._linear(f"{name}attn_output", y)

    def _store(self, cache: Cache, layer: int, key: Tensor, value: Tensor, inputs: Inputs) -> None:
        width = self.config.kv_width
        stored = [self._node("set_rows", cache.keys[layer], self._sized(key, width, self.tokens), inputs.places)]
        if cache.flash:
            stored.append(
                self._node("set_rows", cache.values[layer], self._sized(value, width, self.tokens), inputs.places)
            )
        else:  # every number is a row of its own
            flat = self._sized(cache.values[layer], 1, width * cache.capacity)
            assert inputs.value_places is not None
            stored.append(self._node("set_rows", flat, self._sized(value, 1, width * self.tokens), inputs.value_places))
        for tensor in stored:
            self.lib.build_forward_expand(self.graph, tensor)

    def _stored(self, cache: Cache, layer: int) -> tuple[Tensor, Tensor]:
        """Keys (head, seen, kv heads); values the same with flash attention, else (seen, head, kv heads)."""
        c, keys, values = self.config, cache.keys[layer], cache.values[layer]
        kind = kind_of(keys)
        head, row = self.lib.row_size(kind, c.head), strides(keys)[1]
        viewed = self._node("view_3d", keys, c.head, self.seen, c.kv_heads, row, head, 0)
        if cache.flash:
            return viewed, self._node("view_3d", values, c.head, self.seen, c.kv_heads, row, head, 0)
        step = self.lib.row_size(kind_of(values), cache.capacity)
        return viewed, self._node("view_3d", values, self.seen, c.head, c.kv_heads, step, step * c.head, 0)

    def _feed_forward(self, layer: int, x: Tensor, inputs: Inputs) -> Tensor:
        name = f"blk.{layer}.ffn"
        together = self._together(name, x, inputs)
        begun = {} if together else self._begin(name, x)
        up, gate = (together.get(f"{name}{n}") or self._linear(f"{name}{n}", x, begun) for n in ("_up", "_gate"))
        gated = self._node("geglu_split" if self.config.gemma else "swiglu_split", gate, up)
        return self._linear(f"blk.{layer}.ffn_down", gated)

    def _together(self, part: str, x: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """Layers of this part of a block that are two products for all of them → their y (out, 1); one token only."""
        bundle, stack = self.network.bundles.get(part), self.weights.stack(f"{part}{SECONDS}")
        if bundle is None or stack is None or inputs.experts is None or not self.weights.has(part):
            return {}
        if any(f"{name}.bias" in self.network.tensors for name in bundle.layers):
            return {}
        first, count = self._node("mul_mat", self.weights.product(part), x), len(bundle.layers)
        parts = self._sized(first, bundle.rows[0], count, 1)
        y = self._node("mul_mat_id", stack, parts, inputs.experts)
        rows, step = sizes(y)[0], strides(y)[1]
        return {
            name: self._node("view_2d", y, rows, 1, step, place * step) for place, name in enumerate(bundle.layers)
        }

    def _begin(self, part: str, x: Tensor) -> dict[str, Tensor]:
        """Layers of this part of a block whose first cores are one product → their parts of it, of sizes (r, T)."""
        bundle = self.network.bundles.get(part)
        if bundle is None or not self.weights.has(part):
            return {}
        product = self._node("mul_mat", self.weights.product(part), x)
        row, place, found = strides(product)[1], 0, {}
        for layer, rows in zip(bundle.layers, bundle.rows, strict=True):
            part_of = self._node("view_2d", product, rows, sizes(x)[1], row, place)
            # products with packed weights read four tokens of x as one piece of memory
            found[layer] = part_of if sizes(x)[1] == 1 else self._node("cont", part_of)
            place += 4 * rows
        return found

    def _linear(self, name: str, x: Tensor, begun: Mapping[str, Tensor] = MappingProxyType({})) -> Tensor:
        """y (out, T) of x (in, T), with the bias that the file has. begun: layers of which one step is done."""
        if name in begun:
            y = self._contract(name, begun[name], sizes(x)[1], done=1)
        elif name in self.network.programs:
            y = self._contract(name, x, sizes(x)[1])
        else:
            y = self._node("mul_mat", self.weights.product(f"{name}.weight"), x)
        if f"{name}.bias" in self.network.tensors:
            y = self._node("add", y, self.weights.plain(f"{name}.bias"))
        return y

    def _contract(self, name: str, x: Tensor, tokens: int, done: int = 0) -> Tensor:
        program = self.network.programs[name]
        cores = NamedCores(self.weights, program.cores)
        return lower(self.lib, self.context.pointer, program.contraction, cores, x, tokens, done)

    def _rotate(self, x: Tensor, inputs: Inputs, local: bool) -> Tensor:
        c = self.config
        base, scale = (c.rope_base_local, c.rope_scale_local) if local else (c.rope_base, c.rope_scale)
        divisors = self.weights.plain(ROPE_FREQS) if ROPE_FREQS in self.network.tensors else None
        yarn = (0.0, 1.0, 32.0, 1.0)  # off
        return self._node("rope_ext", x, inputs.positions, divisors, c.head, c.rope, c.context, base, scale, *yarn)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return self._node("mul", self._node("rms_norm", x, self.config.epsilon), self.weights.plain(f"{name}.weight"))

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return self._sized(x, self.config.head, heads, self.tokens)

    def _sized(self, x: Tensor, *ne: int) -> Tensor:
        return self._node("reshape_4d", x, *padded(ne))

    def _node(self, name: str, *arguments: float | None) -> Tensor:
        make: Callable[..., Tensor] = getattr(self.lib, name)
        return make(self.context.pointer, *arguments)
