"""Plans and other YAML that people edit.

YAML 1.2, so that `no` is a string and `010` is ten; no tags, no aliases, no duplicate keys.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, ScalarEvent

from edgec import decompose, limits
from edgec.errors import EdgecError, RecipeError
from edgec.fit import stored_bytes
from edgec.modeling import Layer
from edgec.plan.planner import make_choice
from edgec.quantize.formats import LayerFormat
from edgec.records import PLAN_VERSION, Choice, Plan, Spec

_MAX_DEPTH = 16
_HUGE = re.compile(r"[-+]?(0x[0-9A-Fa-f_]{65,}|0o[0-7_]{65,}|0b[01_]{65,}|[0-9_]{20,})")
"""Python refuses to print such numbers, and none is meant."""
_PLAN_KEYS = {"version", "fingerprint", "target", "budget", "totals", "notes", "layers"}
_LAYER_KEYS = {"kind", "ranks", "modes", "format", "bytes", "error", "loss"}


def read_yaml(path: Path) -> Any:
    """Plain mappings, lists and scalars. Raises RecipeError naming the file and line."""
    try:
        with path.open("rb") as file:
            raw = file.read(limits.MAX_YAML_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > limits.MAX_YAML_BYTES:
        raise RecipeError(f"{path}: more than the {limits.MAX_YAML_BYTES} bytes that are read")
    try:
        text = raw.decode("utf-8")
        depth = 0
        for event in YAML(typ="safe", pure=True).parse(text):
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > _MAX_DEPTH:  # the parser's time grows with the square of the depth
                raise RecipeError(f"{path}:{event.start_mark.line + 1}: nested deeper than {_MAX_DEPTH} levels")
            if isinstance(event, DocumentStartEvent) and event.version not in (None, (1, 2)):
                raise RecipeError(f"{path}:{event.start_mark.line + 1}: YAML 1.2 only; remove the %YAML line")
            tagged = isinstance(event, ScalarEvent | CollectionStartEvent) and getattr(event, "ctag", None)
            if isinstance(event, ScalarEvent) and event.style is None and _HUGE.fullmatch(event.value):
                raise RecipeError(f"{path}:{event.start_mark.line + 1}: a number of {len(event.value)} digits")
            merged = isinstance(event, ScalarEvent) and event.value == "<<" and event.style is None
            if isinstance(event, AliasEvent) or tagged or merged:
                raise RecipeError(f"{path}:{event.start_mark.line + 1}: aliases, merges and tags are not allowed")
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, UnicodeDecodeError, ValueError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{where}: not valid YAML ({problem})") from error


def write_plan(plan: Plan) -> str:
    """The plan as YAML with a head that explains itself."""
    body = {
        "version": plan.version,
        "fingerprint": plan.fingerprint,
        "target": plan.target,
        "budget": plan.budget,
        "totals": {"bytes": plan.bytes, "linear_bpw": round(plan.linear_bpw(), 4), "other_bytes": plan.other_bytes},
        "notes": list(plan.notes),
        "layers": {c.layer: _layer_entry(c) for c in plan.choices},
    }
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 110
    yaml.dump(body, stream)
    return (
        "# edgec plan. Edit kind, ranks, modes and format of any layer; `edgec compress --plan` obeys.\n"
        "# Sizes are computed again on reading; error and loss are what was measured for the original choice.\n"
        + stream.getvalue()
    )


def _layer_entry(choice: Choice) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": choice.spec.kind}
    if choice.spec.ranks:
        entry["ranks"] = list(choice.spec.ranks)
    if choice.spec.modes:
        entry["modes"] = [list(m) for m in choice.spec.modes]
    entry["format"] = choice.format
    entry["bytes"] = choice.bytes
    if choice.error is not None:
        entry["error"] = float(f"{choice.error:.4g}")
    if choice.loss is not None:
        entry["loss"] = float(f"{choice.loss:.4g}")
    return entry


def read_plan(path: Path, layers: Sequence[Layer]) -> Plan:
    """Read a plan for a model with these layers. Layers that it does not name stay dense fp32. Raises RecipeError."""
    body = read_yaml(path)
    try:
        return _plan(path, body, {layer.name: layer for layer in layers})
    except RecipeError:
        raise
    except EdgecError as error:
        raise RecipeError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"{path}: not an edgec plan ({error!r})") from error


def _plan(path: Path, body: Any, known: Mapping[str, Layer]) -> Plan:
    if not isinstance(body, dict) or not isinstance(body.get("layers"), dict):
        raise RecipeError(f"{path}: not an edgec plan; expected a mapping with `layers`")
    refuse_unknown(body, _PLAN_KEYS, str(path))
    if body.get("version") != PLAN_VERSION:
        raise RecipeError(f"{path}: plan version {body.get('version')!r}, this edgec reads {PLAN_VERSION}")
    choices: dict[str, Choice] = {}
    for name, entry in body["layers"].items():
        if name not in known:
            raise RecipeError(f"{path}: layer {name!r} is not in the model")
        if not isinstance(entry, dict):
            raise RecipeError(f"{path}: layer {name!r}: expected a mapping with kind and format")
        refuse_unknown(entry, _LAYER_KEYS, f"{path}: layer {name!r}")
        choices[name] = _choice(f"{path}: layer {name!r}", entry, known[name])
    for name, choice in choices.items():  # a tied head of the same format shares the table's bytes
        table = choices.get(known[name].tied_to or "")
        if table and choice.spec.kind == table.spec.kind == "dense" and choice.format == table.format:
            choices[name] = replace(choice, bytes=0)
    other = body.get("totals", {}).get("other_bytes", 0)
    if type(other) is not int or other < 0:
        raise RecipeError(f"{path}: totals: other_bytes is a number of bytes, got {other!r}")
    return Plan(
        str(body["fingerprint"]),
        str(body["target"]),
        str(body["budget"]),
        tuple(choices.values()),
        other,
        tuple(str(n) for n in body.get("notes", [])),
    )


def _choice(where: str, entry: Mapping[str, Any], layer: Layer) -> Choice:
    ranks, modes = entry.get("ranks", []), entry.get("modes", [])
    numbers = [*ranks, *(m for pair in modes for m in pair)]
    if any(type(n) is not int or n < 1 for n in numbers) or any(len(pair) != 2 for pair in modes):
        raise RecipeError(f"{where}: ranks are positive integers and modes are [out, in] pairs of them")
    if entry["kind"] not in (known := decompose.kinds_of(layer.role)):
        raise RecipeError(f"{where}: unknown kind {entry['kind']!r}; known: {', '.join(known)}")
    spec = Spec(str(entry["kind"]), tuple(ranks), tuple((o, i) for o, i in modes))
    try:
        fmt = LayerFormat.parse(str(entry["format"]))
        choice = make_choice(layer, spec, fmt)
    except EdgecError as error:
        raise RecipeError(f"{where}: {error}") from error
    if entry.get("bytes") == 0 or stored_bytes(spec, layer.shape, layer.role, fmt) == entry.get("bytes"):
        numbers_kept = {key: float(entry[key]) for key in ("error", "loss") if entry.get(key) is not None}
        if not all(map(math.isfinite, numbers_kept.values())):
            raise RecipeError(f"{where}: error and loss are finite numbers, got {numbers_kept}")
        return replace(choice, **numbers_kept)  # type: ignore[arg-type]
    return choice


def refuse_unknown(mapping: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raises RecipeError naming the first unknown key."""
    for key in mapping:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(known))}")
