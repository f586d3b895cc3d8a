"""A model run block by block: the weights of one transformer block in memory at a time.

The model itself is only a skeleton, its parameters without memory. Its own code runs once per batch with every block
replaced by a catcher that notes what it was called with (masks, position embeddings: each architecture has its own,
and Gemma's differ from block to block) and hands the hidden state on. From then on a block is its module, the noted
calls and the hidden states that reach it; nothing here knows an architecture. Two things are taken for granted and
checked: a block runs once per pass, and the hidden state goes from one block to the next untouched. Offloading with
forward hooks (as accelerate does) was turned down: it loads every block once per batch instead of once.

Layer names are the model's own, complete ("model.layers.3.mlp.up_proj").
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from edgec import limits, modeling
from edgec.blocks import structure
from edgec.blocks.hidden_states import HiddenStates
from edgec.blocks.observing import Hook, Moments, Stop
from edgec.blocks.stored_weights import StoredWeights
from edgec.calibration import Batches
from edgec.checkpoint import Checkpoint
from edgec.errors import NumericsError, UnsupportedModelError
from edgec.moments import Seen

Rows = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Token ids [u] → rows of a table [u, d]."""


@dataclass(frozen=True)
class Call:
    """What a block was called with besides its hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockWalker:
    """planned: names of the layers that the caller is interested in; they tell which list holds the blocks.

    Call `embed` first, then visit the blocks in order: `load` one, look at it with `see`, change it, `advance` through
    it; then `see_outside` for what comes after the last one. Who also wants to see how far that has moved from the
    dense model calls `embed_dense` before anything is changed, and loads every block twice. Raises
    UnsupportedModelError where the model does not run block by block, NumericsError naming the tensor or block that is
    not finite.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        planned: Iterable[str],
        batches: Batches,
        folder: Path,
        *,
        hidden_bytes: int = limits.MAX_HIDDEN_BYTES,
    ) -> None:
        self.checkpoint, self.batches = checkpoint, batches
        self.model = modeling.hollow(checkpoint)
        self.model.config.use_cache = False
        self.weight = StoredWeights(checkpoint, self.model)
        planned = set(planned)
        path = modeling.block_list(self.model, planned)
        if path is None:
            raise UnsupportedModelError(
                f"{checkpoint.architecture}: no list of transformer blocks that hold planned layers; compress it whole"
            )
        self.path = path
        self.hidden = HiddenStates(folder, hidden_bytes)
        self.dense_hidden: HiddenStates | None = None
        self.calls: list[list[Call]] = []
        self._tuple_of = 0
        self._groups: dict[tuple[Any, ...], list[list[str]]] = {}
        self._addends: dict[tuple[Any, ...], dict[str, str]] = {}
        self._load_outer()

    @property
    def blocks(self) -> nn.ModuleList:
        found = self.model.get_submodule(self.path)
        assert isinstance(found, nn.ModuleList)
        return found

    def __len__(self) -> int:
        return len(self.blocks)

    def name(self, index: int) -> str:
        return f"{self.path}.{index}"

    @cached_property
    def embedding(self) -> str | None:
        """The name of the input embedding."""
        module = self.model.get_input_embeddings()
        return next((name for name, found in self.model.named_modules() if found is module), None)

    @cached_property
    def head(self) -> str | None:
        """The name of the output head, None for an encoder."""
        module = self.model.get_output_embeddings()
        return next((n for n, found in self.model.named_modules() if module is not None and found is module), None)

    def _load_outer(self) -> None:
        """Everything outside the blocks, except the two matrices of vocabulary size, of which only rows are read."""
        large = {f"{name}.weight" for name in (self.embedding, self.head) if name}
        names = [n for n in self.model.state_dict() if n not in large and not n.startswith(f"{self.path}.")]
        self.model.load_state_dict({n: self._tensor(n) for n in names}, strict=False, assign=True)
        if self.embedding:
            dense = self.weight(self.embedding)
            self.set_table(lambda ids: np.asarray(dense[ids], np.float32))

    def _tensor(self, place: str) -> Tensor:
        values = self.weight.tensor(place)
        if values.dtype.kind in "iub":
            return torch.from_numpy(np.array(values))
        values = np.array(values, dtype=np.float32)
        if not np.isfinite(values).all():
            raise NumericsError(f"tensor {place!r} holds NaN or Inf; expected finite weights")
        return torch.from_numpy(values)

    def set_table(self, rows: Rows) -> None:
        """Look the tokens of the batches up in these rows from now on; the table itself is not held."""
        assert self.embedding is not None
        module: Any = self.model.get_submodule(self.embedding)
        known = torch.unique(torch.cat([b["input_ids"].reshape(-1) for b in self.batches.items]))
        values = torch.from_numpy(rows(known.numpy()))
        scale = getattr(module, "embed_scale", None)  # Gemma multiplies inside its embedding module

        def lookup(ids: Tensor) -> Tensor:
            found = nn.functional.embedding(torch.searchsorted(known, ids.contiguous()), values)
            return found if scale is None else found * scale.to(found.dtype)

        module.forward = lookup

    def set_weight(self, layer: str, weight: NDArray[np.float32]) -> None:
        """Replace the weight of a layer outside the blocks."""
        module: Any = self.model.get_submodule(layer)
        module.weight = nn.Parameter(torch.from_numpy(weight), requires_grad=False)

    def embed_dense(self) -> None:
        """Keep the dense model's hidden states as well from now on; the two share the memory."""
        cap = self.hidden.cap_bytes // 2
        self.dense_hidden = HiddenStates(self.hidden.folder, cap, "dense")
        self._embed(self.dense_hidden)
        self.hidden = HiddenStates(self.hidden.folder, cap)

    def embed(self) -> None:
        """Run every batch up to the first block, and note what each block is called with."""
        self._embed(self.hidden)

    def _embed(self, hidden_states: HiddenStates) -> None:
        self._tuple_of = self._output_form()
        self.calls = [[] for _ in range(len(self))]
        for number, batch in enumerate(self.batches.items):
            before: list[Tensor] = []

            def catch(
                index: int, hidden: Tensor, call: Call, number: int = number, before: list[Tensor] = before
            ) -> Any:
                if len(before) != index or (before and before[-1] is not hidden):
                    raise UnsupportedModelError(
                        f"{self.checkpoint.architecture}: {self.name(index)} does not get what the block before it "
                        "made; compress it whole"
                    )
                if any(isinstance(v, transformers.Cache) for v in (*call.args, *call.kwargs.values())):
                    raise UnsupportedModelError(f"{self.checkpoint.architecture}: {self.name(index)} wants a cache")
                if index == 0:
                    hidden_states.put(number, hidden)
                before.append(hidden)
                self.calls[index].append(call)
                return self._output(hidden)

            self._outer(batch, catch)
            if len(before) != len(self):
                raise UnsupportedModelError(
                    f"{self.checkpoint.architecture}: {len(before)} of {len(self)} blocks ran; compress it whole"
                )

    def _output_form(self) -> int:
        """0 where a block gives a tensor, else the length of the tuple whose first item is the hidden state.

        One block is run on a few tokens to find out.
        """
        small = {name: part[:1, :8] for name, part in self.batches.items[0].items()}
        seen: list[Any] = []

        def first(index: int, hidden: Tensor, call: Call) -> Any:
            with self.load(index) as block:
                seen.append(block(hidden, *call.args, **call.kwargs))
            raise Stop

        self._outer(small, first)
        output = seen[0]
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return len(output)
        if not isinstance(output, Tensor):
            raise UnsupportedModelError(
                f"{self.checkpoint.architecture}: a block gives {type(output).__name__}, expected a hidden state"
            )
        return 0

    def _output(self, hidden: Tensor) -> Any:
        return (hidden, *(None for _ in range(self._tuple_of - 1))) if self._tuple_of else hidden

    @torch.no_grad()
    def _outer(self, batch: dict[str, Tensor], stand_in: Callable[[int, Tensor, Call], Any]) -> None:
        """The model on one batch with `stand_in` in place of every block, up to its head."""
        handles = []
        for index, block in enumerate(self.blocks):
            block.forward = _caught(index, stand_in)
        if self.head:
            handles.append(self.model.get_submodule(self.head).register_forward_pre_hook(_stop))
        try:
            with suppress(Stop):
                self.model(**batch)
        finally:
            for handle in handles:
                handle.remove()
            for block in self.blocks:
                del block.forward

    @contextmanager
    def load(self, index: int) -> Iterator[nn.Module]:
        """The block with its dense weights, float32: a copy, gone at the end."""
        config = self.model.config
        block: nn.Module = copy.deepcopy(self.blocks[index], {id(config): config})
        vars(block).pop("forward", None)  # a catcher's
        prefix = f"{self.name(index)}."
        block.load_state_dict({n: self._tensor(prefix + n) for n in block.state_dict()}, assign=True)
        block.requires_grad_(False)
        try:
            yield block
        finally:
            # Whoever still refers to the block, a cycle in a traceback for one, must not hold on to its weights.
            for parameter in block.parameters():
                parameter.data = parameter.data.new_empty(0)
            gc.collect()

    @torch.no_grad()
    def run(self, index: int, block: nn.Module, batch: int, *, dense: bool = False) -> Tensor:
        """The block's hidden state [B, T, d] for one batch. dense: on the dense model's hidden states."""
        call = self.calls[index][batch]
        output = block(self._states(dense).get(batch), *call.args, **call.kwargs)
        hidden: Tensor = output[0] if self._tuple_of else output
        return hidden

    def _states(self, dense: bool) -> HiddenStates:
        if not dense:
            return self.hidden
        assert self.dense_hidden is not None
        return self.dense_hidden

    def advance(self, index: int, block: nn.Module, dense: nn.Module | None = None) -> None:
        """Replace the hidden states by what the block makes of them, and the dense model's by what `dense` does."""
        for running, is_dense in _passes(block, dense):
            for batch in range(len(self.batches.items)):
                hidden = self.run(index, running, batch, dense=is_dense)
                if not torch.isfinite(hidden).all():
                    raise NumericsError(f"block {self.name(index)!r} is not finite on the calibration text")
                self._states(is_dense).put(batch, hidden)

    def groups(self, index: int, block: nn.Module, layers: Sequence[str]) -> list[list[str]]:
        """The block's layers in the order in which they run; those that read the same tensor come together.

        A layer that no token reached is in none.
        """
        prefix = f"{self.name(index)}."
        names = tuple(layer.removeprefix(prefix) for layer in layers)
        key = (type(block), *names)
        if key not in self._groups:
            self._groups[key] = structure.groups(block, names, lambda: self.run(index, block, 0))
        return [[prefix + name for name in group] for group in self._groups[key]]

    def addends(self, index: int, block: nn.Module, layers: Sequence[str]) -> dict[str, str]:
        """Layer → the submodule of the block, "" for itself, that gets as its input what the layer's output is added
        to; layers whose outputs are not added to anything are left out.
        """
        prefix = f"{self.name(index)}."
        names = tuple(layer.removeprefix(prefix) for layer in layers)
        key = (type(block), *names)
        if key not in self._addends:
            hidden = self.hidden.get(0)
            self._addends[key] = structure.addends(block, names, hidden, lambda: self.run(index, block, 0))
        return {prefix + name: addend for name, addend in self._addends[key].items()}

    def see(
        self,
        index: int,
        block: nn.Module,
        layers: Sequence[str],
        dense: nn.Module | None = None,
        addends: Mapping[str, str] | None = None,
    ) -> dict[str, Seen]:
        """What reaches these layers, over the unmasked tokens; a pass ends where the last of them begins.

        dense: the same block with its dense weights, to be told the drift as well. addends: of `addends`, for those
        layers whose sums are to be looked at. Raises NumericsError naming the layer.
        """
        prefix, addends = f"{self.name(index)}.", {n: a for n, a in (addends or {}).items() if n in layers}
        with ExitStack() as hooks:
            moments, passes = self._moments(len(layers), addends), _passes(block, dense)
            for module, _ in passes:
                for name in set(addends.values()) - {""}:
                    hooks.callback(_watch(module.get_submodule(name), moments.noting(name)))
                for layer in layers:
                    hooks.callback(_watch(module.get_submodule(layer.removeprefix(prefix)), moments.hook(layer)))
            for batch in range(len(self.batches.items)):
                for running, is_dense in passes:
                    moments.start(batch, stop=True, dense=is_dense)
                    if "" in addends.values():
                        moments.note("", self._states(is_dense).get(batch))
                    with suppress(Stop):
                        self.run(index, running, batch, dense=is_dense)
        return moments.finished()

    def see_outside(self, layers: Sequence[str], *, after: bool) -> dict[str, Seen]:
        """The same of layers outside the blocks: of those that run before the first block, or (after) behind the last
        one. Layers on the other side are not in the result.
        """
        with ExitStack() as hooks:
            moments = self._moments(len(layers), {})
            for layer in layers:
                hooks.callback(_watch(self.model.get_submodule(layer), moments.hook(layer)))
            for number, batch in enumerate(self.batches.items):
                for dense in (True, False) if after and self.dense_hidden is not None else (False,):
                    moments.start(number, stop=False, dense=dense)
                    moments.seeing = not after

                    def pass_on(
                        index: int, hidden: Tensor, call: Call, number: int = number, dense: bool = dense
                    ) -> Any:
                        if not after:
                            raise Stop
                        moments.seeing = True
                        return self._output(self._states(dense).get(number) if index == len(self) - 1 else hidden)

                    self._outer(batch, pass_on)
        return moments.finished()

    def _moments(self, count: int, addends: Mapping[str, str]) -> Moments:
        return Moments([b["attention_mask"].bool() for b in self.batches.items], count, addends)


def _passes(block: nn.Module, dense: nn.Module | None) -> list[tuple[nn.Module, bool]]:
    """What a batch goes through, in order: (module, is it the dense one)."""
    return [(block, False)] if dense is None else [(dense, True), (block, False)]


def _watch(module: nn.Module, hook: Hook) -> Callable[[], None]:
    """Registers the hook; the result takes it away."""
    return module.register_forward_pre_hook(hook, prepend=True).remove


def _stop(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    raise Stop


def _caught(index: int, stand_in: Callable[[int, Tensor, Call], Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if args:
            return stand_in(index, args[0], Call(args[1:], kwargs))
        hidden = kwargs.pop("hidden_states")
        return stand_in(index, hidden, Call((), kwargs))

    return forward
