"""How the layers of a block hang together, found by running it once and looking at what they are given and give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[], Tensor]
"""Runs the block on some tokens: its hidden state."""


def groups(block: nn.Module, names: Sequence[str], run: Run) -> list[list[str]]:
    """The named layers in the order in which they run; those that read the same tensor come together. A layer that no
    token reached is in none.
    """
    seen: list[tuple[str, Tensor]] = []

    def see(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, inputs: seen.append((name, inputs[0]))

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(block.get_submodule(name).register_forward_pre_hook(see(name)).remove)
        run()
    found: list[list[str]] = []
    for at, (name, x) in enumerate(seen):
        if at and x is seen[at - 1][1]:
            found[-1].append(name)
        else:
            found.append([name])
    return found


def addends(block: nn.Module, names: Sequence[str], hidden: Tensor, run: Run) -> dict[str, str]:
    """Which of the named layers' outputs are added to another tensor, the residual stream: layer → the submodule that
    gets this tensor as its input, "" for the block itself. hidden: what `run` gives the block.

    A layer is one of them if its output plus a tensor that was there before is, bit for bit, what some submodule gets
    or the block gives afterwards. So it works for norms before and behind the sum, and an architecture that scales or
    normalises the output first has none.
    """
    given: list[tuple[str, Tensor]] = [("", hidden)]
    made: dict[str, tuple[int, Tensor]] = {}

    def before(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                given.append((name, inputs[0]))

        return see

    def after(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def see(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
            made[name] = (len(given), output)

        return see

    with ExitStack() as hooks:
        for name, module in block.named_modules():
            if name:
                hooks.callback(module.register_forward_pre_hook(before(name)).remove)
        for name in names:
            hooks.callback(block.get_submodule(name).register_forward_hook(after(name)).remove)
        given.append(("", run()))
    found = {}
    for name, (place, output) in made.items():
        later = [tensor for _, tensor in given[place:] if tensor.shape == output.shape]
        for addend, tensor in given[:place]:
            if tensor.shape == output.shape and any(torch.equal(tensor + output, other) for other in later):
                found[name] = addend
                break
    return found
