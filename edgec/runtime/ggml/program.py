"""The contraction programs of a factored GGUF: one JSON text in its metadata, strict in both directions.

A step is a short list, `["matmul", core, n, k]`; the wall's own classes give the names and the checks, so that a
program that can be read is one that can be run. JSON was chosen over one metadata key per step because a file has
thousands of steps and llama.cpp logs every key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgec import limits
from edgec.contraction import (
    BlockMatMul,
    Contraction,
    Gather,
    MatMul,
    ReduceSum,
    Reshape,
    Scale,
    Step,
    Sum,
    Transpose,
    core_shapes,
)
from edgec.errors import CheckpointError, PlanError

FORMAT = 1
"""Version of the layout of files, metadata `FORMAT_KEY`."""
PROGRAMS_KEY, ROTATION_KEY = "edgec.programs", "edgec.rope.layout"
SELFTEST_IDS, SELFTEST_TOKENS, SELFTEST_LOGITS = (
    "edgec.selftest.ids",
    "edgec.selftest.tokens",
    "edgec.selftest.logits",
)

MAX_BYTES = 4 * 1024 * 1024
"""Longest text of all programs of a file [bytes]; a hundred layers of five steps take 30 kB."""
MAX_STEPS = 256
"""Most steps of one layer [count], those inside branches too."""
MAX_BRANCHES = 16
_MAX_DEPTH = 8

_OF_TWO_SIZES: Mapping[str, type[Any]] = {"matmul": MatMul, "block_matmul": BlockMatMul, "gather": Gather}


@dataclass(frozen=True)
class Program:
    """A factored layer. cores: name in the contraction → tensor of the file."""

    contraction: Contraction
    cores: Mapping[str, str]


def encode(programs: Mapping[str, Program]) -> str:
    """Layers by name → the text; equal programs give equal texts."""
    record = {
        layer: {
            "out": p.contraction.out_features,
            "in": p.contraction.in_features,
            "cores": dict(sorted(p.cores.items())),
            "steps": [_written(step) for step in p.contraction.steps],
        }
        for layer, p in sorted(programs.items())
    }
    return json.dumps(record, separators=(",", ":"))


def decode(text: str, source: object) -> dict[str, Program]:
    """Inverse of `encode` for a text that nobody vouches for. Raises CheckpointError naming `source` and the layer."""
    if len(text) > MAX_BYTES:
        raise CheckpointError(f"{source}: {PROGRAMS_KEY} has {len(text)} characters, at most {MAX_BYTES} are read")
    try:
        record = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: {PROGRAMS_KEY} is not sound JSON ({error})") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{source}: {PROGRAMS_KEY} must be an object of layers")
    found = {}
    for layer, entry in record.items():
        try:
            found[layer] = _program(entry)
        except (PlanError, ValueError) as error:
            raise CheckpointError(f"{source}: the program of layer {layer[:80]!r}: {str(error)[:500]}") from error
    return found


def _written(step: Step) -> list[Any]:
    match step:
        case Sum(branches):
            return ["sum", [[_written(inner) for inner in branch] for branch in branches]]
        case Reshape(shape):
            return ["reshape", list(shape)]
        case Transpose(perm):
            return ["transpose", list(perm)]
        case MatMul(core, n, k):
            return ["matmul", core, n, k]
        case BlockMatMul(core, g, b):
            return ["block_matmul", core, g, b]
        case Scale(core, n):
            return ["scale", core, n]
        case ReduceSum(axis):
            return ["reduce_sum", axis]
        case Gather(core, v, n):
            return ["gather", core, v, n]


def _program(entry: Any) -> Program:
    if not isinstance(entry, dict) or set(entry) != {"out", "in", "cores", "steps"}:
        raise ValueError("expected the keys out, in, cores, steps")
    cores = entry["cores"]
    if not isinstance(cores, dict) or not all(isinstance(name, str) for name in cores.values()):
        raise ValueError("cores must map names to names of tensors")
    steps = _steps(entry["steps"], _Count())
    contraction = Contraction(_number(entry["out"]), _number(entry["in"]), steps)
    if (wanted := set(core_shapes(contraction))) != set(cores):
        raise ValueError(f"the steps use the cores {sorted(wanted)}, listed are {sorted(cores)}")
    return Program(contraction, cores)


class _Count:
    """Steps so far, those inside branches too."""

    def __init__(self) -> None:
        self.steps = 0


def _steps(found: Any, count: _Count, depth: int = 0) -> tuple[Step, ...]:
    if not isinstance(found, list) or not found:
        raise ValueError("steps must be a list that is not empty")
    count.steps += len(found)
    if depth > _MAX_DEPTH or count.steps > MAX_STEPS:
        raise ValueError(f"more than {MAX_STEPS} steps, or sums nested deeper than {_MAX_DEPTH}")
    return tuple(_step(step, count, depth) for step in found)


def _step(found: Any, count: _Count, depth: int) -> Step:
    match found:
        case ["sum", [*branches]] if 1 <= len(branches) <= MAX_BRANCHES:
            return Sum(tuple(_steps(branch, count, depth + 1) for branch in branches))
        case ["reshape", [*shape]] if len(shape) <= limits.MAX_TENSOR_RANK:
            return Reshape(_numbers(shape))
        case ["transpose", [*perm]] if len(perm) <= limits.MAX_TENSOR_RANK:
            return Transpose(_numbers(perm, low=0))
        case ["reduce_sum", axis]:
            return ReduceSum(_number(axis, low=0))
        case ["scale", str(core), n]:
            return Scale(core, _number(n))
        case ["matmul" | "block_matmul" | "gather" as kind, str(core), first, second]:
            step: Step = _OF_TWO_SIZES[kind](core, _number(first), _number(second))
            return step
    raise ValueError(f"unknown step {str(found)[:80]}")


def _numbers(found: Sequence[Any], low: int = 1) -> tuple[int, ...]:
    return tuple(_number(value, low) for value in found)


def _number(value: Any, low: int = 1) -> int:
    if type(value) is not int or not low <= value <= limits.MAX_DIMENSION:
        raise ValueError(f"expected a whole number from {low} to {limits.MAX_DIMENSION}, got {str(value)[:40]}")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key appears twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number here")
