"""One plugin per file, found by file name; a plugin that fails to import is a loud error.

Entry points were turned down: a plugin named in a checkpoint, recipe or environment must never be able to run code,
so only files that ship inside edgec's own packages count.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

from edgec.errors import UsageError


@cache
def names(package: str) -> tuple[str, ...]:
    """Names of the plugins in a package such as "edgec.decompose": its modules that define `PLUGIN = True`, sorted."""
    found = importlib.import_module(package)
    modules = [m.name for m in pkgutil.iter_modules(found.__path__) if not m.name.startswith("_")]
    return tuple(sorted(m for m in modules if getattr(importlib.import_module(f"{package}.{m}"), "PLUGIN", False)))


def load(package: str, name: str) -> ModuleType:
    """The plugin `name` of a package. Raises UsageError listing the ones that exist; a name is never a path."""
    if name not in names(package):
        room = package.rpartition(".")[2]
        raise UsageError(f"unknown {room} plugin {name!r}; known: {', '.join(names(package))}")
    return importlib.import_module(f"{package}.{name}")
