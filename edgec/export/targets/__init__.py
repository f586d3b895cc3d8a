"""One file per target, found by file name: `PLUGIN = True` and `TARGET`, a `Target` named as `--target` names it."""

from __future__ import annotations

from dataclasses import replace

from edgec import plugins
from edgec.errors import UsageError
from edgec.records import ARITHMETICS, Target


def all_targets() -> dict[str, Target]:
    """Every target by its command-line name ("onnx-x64")."""
    found = (plugins.load(__name__, name).TARGET for name in plugins.names(__name__))
    return {target.name: target for target in found}


def get_target(name: str) -> Target:
    """Raises UsageError listing the known ones."""
    targets = all_targets()
    if name not in targets:
        raise UsageError(f"unknown target {name!r}; known: {', '.join(sorted(targets))}")
    return targets[name]


def parse_arithmetic(text: str) -> str:
    """How an ONNX encoder is to multiply: one of `ARITHMETICS`. Raises UsageError."""
    if text not in ARITHMETICS:
        raise UsageError(f"--arithmetic is {' or '.join(ARITHMETICS)}, got {text!r}")
    return text


def offered(target: Target, *, encoder: bool) -> Target:
    """The target with the forms that a search may choose from for this kind of model.

    Beside int8 products, a rotation is too slow to be worth its 4 to 8 % less error: it takes a tenth to a fifth of
    MiniLM's time. A plan that names one is still run.
    """
    return replace(target, rotated_formats=()) if target.multiplies_in_int8(encoder=encoder) else target
