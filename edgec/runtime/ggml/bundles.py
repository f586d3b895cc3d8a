"""First cores of layers that read the same input, multiplied with as one matrix; second cores of one shape, as two
experts that are both asked.

Two low-rank layers on one input are four products, and each costs two waits of all threads for one another, whatever
its size. Their first cores stacked are one product of the same numbers; the second cores read its parts.
(Measured at two threads: three products fewer of 14 in a block save 5 to 8 % of a step.)
Where the second cores are of one shape too, as those of a gate and its partner are, a single token passes through them
in one `mul_mat_id`: 157 µs instead of 172 for a pair of 8192 × 800 in Q4_0. Prompts are left alone, which that
operation is slower at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgec.contraction import MatMul, walk
from edgec.runtime.ggml.program import Program

PAIR = 2
"""Layers whose second cores can be asked together [count]: a gate and its partner."""
_TOGETHER = {"attn": ("attn_q", "attn_k", "attn_v"), "ffn": ("ffn_gate", "ffn_up")}


@dataclass(frozen=True)
class Bundle:
    """Layers of one input; per layer the tensor of its first core, and that core's rows. seconds: per layer the tensor
    of its second core, where that ends the layer and they are a pair of one shape; else ().
    """

    layers: tuple[str, ...]
    cores: tuple[str, ...]
    rows: tuple[int, ...]
    seconds: tuple[str, ...] = ()


def bundles(programs: Mapping[str, Program], others: Iterable[str] = ()) -> dict[str, Bundle]:
    """By block and part: "blk.0.attn", "blk.0.ffn". others: tensors that are used beside the programs' cores.

    A layer takes part whose program starts with a product, by a core that nothing else uses.
    """
    used = Counter(others)
    for program in programs.values():
        steps = (getattr(step, "core", None) for step in walk(program.contraction.steps))
        used.update(program.cores[core] for core in steps if core is not None)
    found = {}
    for block in dict.fromkeys(name.rpartition(".")[0] for name in programs):
        for part, together in _TOGETHER.items():
            members = []
            for layer in (f"{block}.{name}" for name in together if f"{block}.{name}" in programs):
                program = programs[layer]
                first = program.contraction.steps[0]
                if isinstance(first, MatMul) and used[program.cores[first.core]] == 1:
                    members.append((layer, program.cores[first.core], first.n))
            if len(members) > 1:
                layers, cores, rows = zip(*members, strict=True)
                seconds = _seconds([programs[name] for name in layers], used) if part == "ffn" else ()
                found[f"{block}.{part}"] = Bundle(layers, cores, rows, seconds)
    return found


def _seconds(programs: Sequence[Program], used: Mapping[str, int]) -> tuple[str, ...]:
    """Second cores of layers that are two products each, if they are of one shape and nothing else uses them."""
    shapes, found = set(), []
    if len(programs) != PAIR:
        return ()
    for program in programs:
        second = program.contraction.steps[1] if len(program.contraction.steps) == 2 else None
        if not isinstance(second, MatMul) or used[program.cores[second.core]] > 1:
            return ()
        shapes.add((second.n, second.k))
        found.append(program.cores[second.core])
    return tuple(found) if len(shapes) == 1 else ()


def file_order(tensors: Sequence[str], programs: Mapping[str, Program]) -> list[str]:
    """The tensors with those of a bundle side by side: weights that are read from the mapped file, not packed, are one
    matrix only if they lie so.
    """
    first = {core: place for place, bundle in enumerate(bundles(programs).values()) for core in bundle.cores}
    return sorted(tensors, key=lambda name: first.get(name, len(first)))
