"""Recipes: the settings of one export as a small YAML file that a team keeps beside its model.

Relative paths start from the recipe's own folder, so that a recipe means the same from wherever it is used, and are
taken as they are written: no `~`, no environment variables. Everything is checked on reading, before any work, and
every error names the file and the key. A recipe that names both a plan and a budget is refused: a plan already says
what every layer becomes, and a limit that decides nothing would only look like one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from edgec.errors import EdgecError, RecipeError
from edgec.export.targets import all_targets, get_target, parse_arithmetic
from edgec.heal.settings import parse_heal
from edgec.plan.acceptance import parse_max_loss
from edgec.plan.budget import parse_budget, parse_time
from edgec.plan.files import read_yaml, refuse_unknown
from edgec.plan.planner import constrained_plan
from edgec.plan.refine import parse_search

T = TypeVar("T")

RECIPE_VERSION = 1

_CONSTRAINTS = ("uniform:", "dense:")
"""What a plan that is no file begins with."""


_ANSWERS = {"budget", "max_loss", "plan"}
"""What decides how small: one of them at a time."""


@dataclass(frozen=True)
class Recipe:
    """What one export should be. A field that is None is left to the command line, or to the target's default.

    target: a name from `edgec targets`. plan: a constraint ("uniform:0.5") or the path of a plan file. calibration: a
    .txt or .jsonl file. description: for the reader. Every other field is as typed after the option of its name.
    """

    version: int = RECIPE_VERSION
    target: str | None = None
    budget: str | None = None
    max_loss: str | None = None
    max_latency: str | None = None
    plan: str | None = None
    search: str | None = None
    heal: str | None = None
    heal_method: str | None = None
    seed: int | None = None
    arithmetic: str | None = None
    calibration: Path | None = None
    description: str = ""

    def merged(self, **options: str | int | Path | None) -> Recipe:
        """The recipe with every option that is not None in place of its own value.

        Budget, max_loss and plan answer the same question: an option for one of them drops what the recipe says of the
        others; a plan drops its max_latency too, which caps what is planned.
        """
        given = {name: value for name, value in options.items() if value is not None}
        dropped: set[str] = set()
        if given.keys() & _ANSWERS:
            dropped |= _ANSWERS
        if "plan" in given:
            dropped.add("max_latency")
        return replace(self, **(dict.fromkeys(dropped) | given))  # type: ignore[arg-type]


def read_recipe(path: Path) -> Recipe:
    """Raises RecipeError naming the file and the key."""
    body = read_yaml(path)
    if not isinstance(body, dict):
        raise RecipeError(f"{path}: expected a mapping such as `target: onnx-x64`, got {_kind(body)}")
    refuse_unknown(body, {field.name for field in fields(Recipe)}, str(path))
    version = body.get("version")
    if type(version) is not int or version != RECIPE_VERSION:
        said = "is missing" if "version" not in body else f"is {version!r}"
        raise RecipeError(f"{path}: version {said}; this edgec reads `version: {RECIPE_VERSION}`")
    if "max_loss" in body and ("budget" in body or "plan" in body):
        raise RecipeError(f"{path}: max_loss is instead of a budget or a plan; keep one of them")
    if "budget" in body and "plan" in body:
        raise RecipeError(
            f"{path}: names both plan and budget; a plan already decides every layer, so keep one of them "
            "(`edgec plan --budget` makes a plan that fits)"
        )
    if "max_latency" in body and "plan" in body:
        raise RecipeError(f"{path}: a plan already decides every layer; leave max_latency out")
    target = _target(path, body)
    return Recipe(
        version=RECIPE_VERSION,
        target=target,
        budget=_budget(path, body),
        max_loss=_max_loss(path, body),
        max_latency=_as_typed(path, body, "max_latency", lambda text: parse_time(text, "")),
        plan=_plan(path, body, target),
        search=_as_typed(path, body, "search", parse_search),
        heal=_as_typed(path, body, "heal", parse_heal),
        heal_method=_as_typed(path, body, "heal_method", lambda text: parse_heal("off", method=text)),
        seed=_seed(path, body),
        arithmetic=_as_typed(path, body, "arithmetic", parse_arithmetic),
        calibration=_calibration(path, body),
        description=_text(path, body, "description") or "",
    )


def _target(path: Path, body: Mapping[str, Any]) -> str | None:
    name = _text(path, body, "target")
    return None if name is None else _checked(path, "target", lambda: get_target(name).name)


def _budget(path: Path, body: Mapping[str, Any]) -> str | None:
    if type(value := body.get("budget")) in (int, float):  # 0.3 is a number in YAML; bool is an int in Python
        body = {"budget": str(value)}
    text = _text(path, body, "budget")
    return None if text is None else _checked(path, "budget", lambda: str(parse_budget(text)))


def _plan(path: Path, body: Mapping[str, Any], target: str | None) -> str | None:
    text = _text(path, body, "plan")
    if text is None:
        return None
    if text.startswith(_CONSTRAINTS):
        any_target = get_target(target) if target else next(iter(all_targets().values()))
        _checked(path, "plan", lambda: constrained_plan(text, [], any_target, ""))
        return text
    return str(_file(path, "plan", text, "a plan file, or a constraint such as uniform:0.5 or dense:fp32"))


def _max_loss(path: Path, body: Mapping[str, Any]) -> str | None:
    if type(value := body.get("max_loss")) is float:
        body = {"max_loss": str(value)}
    text = _text(path, body, "max_loss")
    return None if text is None else _checked(path, "max_loss", lambda: parse_max_loss(text).text)


def _as_typed(path: Path, body: Mapping[str, Any], key: str, parse: Callable[[str], object]) -> str | None:
    """What would be typed after an option, if its own parser takes it."""
    text = _text(path, body, key)
    if text is not None:
        _checked(path, key, lambda: parse(text))
    return text


def _seed(path: Path, body: Mapping[str, Any]) -> int | None:
    if "seed" not in body:
        return None
    value = body["seed"]
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise RecipeError(f"{path}: seed: expected a whole number from 0 on, got {value!r:.40}")
    return value


def _calibration(path: Path, body: Mapping[str, Any]) -> Path | None:
    text = _text(path, body, "calibration")
    return None if text is None else _file(path, "calibration", text, "a .txt or .jsonl file")


def _file(path: Path, key: str, text: str, expected: str) -> Path:
    """A file that the recipe names, which exists: relative to the recipe's folder, or absolute."""
    found = path.parent / text
    try:
        there = found.is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        there = False
    if not there:
        raise RecipeError(f"{path}: {key}: no file {str(found)[:200]!r}; expected {expected}")
    return found


def _text(path: Path, body: Mapping[str, Any], key: str) -> str | None:
    """A non-empty string, or None where the key is absent; never a number, a boolean or a null."""
    if key not in body:
        return None
    value = body[key]
    if not isinstance(value, str):
        raise RecipeError(f"{path}: {key}: expected a string, got {_kind(value)}")
    if not value.strip():
        raise RecipeError(f"{path}: {key}: is empty; leave the line out instead")
    return value


def _checked(path: Path, key: str, check: Callable[[], T]) -> T:
    """check(), with the errors of other rooms told as the recipe's."""
    try:
        return check()
    except EdgecError as error:
        reason = str(error).strip().removeprefix("--").removeprefix(f"{key} ")
        raise RecipeError(f"{path}: {key}: {reason}") from error


def _kind(value: Any) -> str:
    """What a value is, in YAML's words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool | int | float):
        return f"{'a boolean' if isinstance(value, bool) else 'a number'} ({str(value)[:40]})"
    names = {"str": "a string", "list": "a list", "dict": "a mapping"}
    name = type(value).__name__
    return names.get(name, f"a {name}")
