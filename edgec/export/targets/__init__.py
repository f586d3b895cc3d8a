"""One file per target, found by file name: `PLUGIN = True` and `TARGET`, a `Target` named as `--target` names it."""

from __future__ import annotations

from edgec import plugins
from edgec.errors import UsageError
from edgec.records import Target


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
