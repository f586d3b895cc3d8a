"""Recipes: every one that ships loads and asks for what its target has; everything malformed is refused by name."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from edgec.errors import RecipeError
from edgec.export.targets import all_targets
from edgec.plan.budget import parse_budget
from edgec.recipe import RECIPE_VERSION, Recipe, read_recipe

SHIPPED = sorted((Path(__file__).resolve().parents[1] / "recipes").iterdir())
CALLS_HOME = "target: !!python/object/apply:os.system ['touch {}']"


def write(folder: Path, body: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(body, encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    message = str(caught.value)
    assert message.startswith(str(path)), "the error names the file"
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_recipe_loads(path: Path) -> None:
    recipe = read_recipe(path)
    assert path.suffix == ".yaml"
    assert recipe.target in all_targets()
    assert (recipe.budget is None) != (recipe.plan is None), "says how small, or what exactly"
    assert recipe.description
    assert path.read_text(encoding="utf-8").startswith("# "), "begins with a comment that says why"
    if path.stem != "uniform-half-speed-test":
        assert path.stem.endswith(f"-{recipe.target}"), "the name says the target"


def test_a_recipe_for_every_target_and_family() -> None:
    stems = [path.stem for path in SHIPPED]
    assert {read_recipe(path).target for path in SHIPPED} == set(all_targets())
    for family in ("minilm", "llama", "qwen", "phi-3", "gemma", "smollm", "mistral"):
        assert any(stem.startswith(family) for stem in stems), family


def test_every_field_is_read(tmp_path: Path) -> None:
    text = write(tmp_path, "words", "text.txt")
    path = write(
        tmp_path,
        "version: 1\ntarget: onnx-arm64\nbudget: 4bpw-linear\nheal: off\ncalibration: text.txt\ndescription: why\n",
    )
    expected = Recipe(target="onnx-arm64", budget="4bpw-linear", heal="off", calibration=text, description="why")
    assert read_recipe(path) == expected
    path = write(
        tmp_path,
        "version: 1\nmax_loss: 2%\nmax_latency: 5ms\nsearch: anneal:10min\nheal: 300steps\nheal_method: lora\n"
        "seed: 7\narithmetic: packed\n",
    )
    assert read_recipe(path) == Recipe(
        max_loss="2%",
        max_latency="5ms",
        search="anneal:10min",
        heal="300steps",
        heal_method="lora",
        seed=7,
        arithmetic="packed",
    )
    assert read_recipe(write(tmp_path, "version: 1")) == Recipe()


@pytest.mark.parametrize("text", ["0.3", "1", "3e-1", "12MB", "4bpw", "'0.3'"])
def test_a_budget_may_be_a_number(tmp_path: Path, text: str) -> None:
    recipe = read_recipe(write(tmp_path, f"version: 1\nbudget: {text}\n"))
    assert recipe.budget is not None
    assert parse_budget(recipe.budget).value == parse_budget(text.strip("'")).value


@pytest.mark.parametrize("plan", ["uniform:0.5", "uniform:0.5:int8-b32", "dense:fp32", "dense:int4-b32"])
def test_a_plan_may_be_a_constraint(tmp_path: Path, plan: str) -> None:
    assert read_recipe(write(tmp_path, f"version: 1\nplan: {plan}\n")).plan == plan


def test_paths_start_from_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, elsewhere = tmp_path / "team", tmp_path / "elsewhere"
    for folder in (home, elsewhere, home / "texts"):
        folder.mkdir()
    plan, text = write(home, "version: 1", "plan.yaml"), write(home / "texts", "words", "a b.txt")
    write(elsewhere, "version: 1", "plan.yaml")
    path = write(home, "version: 1\nplan: plan.yaml\ncalibration: texts/a b.txt\n")
    monkeypatch.chdir(elsewhere)
    recipe = read_recipe(path)
    assert (recipe.plan, recipe.calibration) == (str(plan), text)
    absolute = write(home, f"version: 1\ncalibration: {text}\n", "absolute.yaml")
    assert read_recipe(absolute).calibration == text


@pytest.mark.parametrize("key", ["plan", "calibration"])
@pytest.mark.parametrize("name", ["none.txt", "~/text.txt", "$HOME/text.txt", "'*.txt'", ".", '"a\\0b"', '"\\ud800"'])
def test_a_named_file_must_exist_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, name: str
) -> None:
    """No `~`, variable or pattern is expanded; a folder, a NUL or half a surrogate pair is no file."""
    write(tmp_path, "words", "text.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    message = refusal(write(tmp_path, f"version: 1\n{key}: {name}\n"))
    assert f"{key}: no file" in message


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("", "expected a mapping.*got nothing"),
        ("- version: 1", "expected a mapping.*got a list"),
        ("onnx-x64", "expected a mapping.*got a string"),
        ("target: onnx-x64", "version is missing; this edgec reads `version: 1`"),
        ("version: 2", "version is 2"),
        ("version: true", "version is True"),
        ("version: '1'", "version is '1'"),
        ("version: 1.0", "version is 1.0"),
        ("version: 1\nbudjet: 4bpw", "unknown key 'budjet'; known: .*budget, "),
        ("version: 1\n1: x", "unknown key 1"),
        ("version: 1\n? [a]\n: b", "unknown key"),
        ("version: 1\ntarget: onnx-z80", "target: unknown target 'onnx-z80'; known: gguf, .*onnx-arm64, onnx-x64"),
        ("version: 1\ntarget: 64", r"target: expected a string, got a number \(64\)"),
        ("version: 1\ntarget:", "target: expected a string, got nothing"),
        ("version: 1\ntarget: ''", "target: is empty"),
        ("version: 1\ntarget: [onnx-x64]", "target: expected a string, got a list"),
        ("version: 1\nbudget: true", r"budget: expected a string, got a boolean \(True\)"),
        ("version: 1\nbudget: small", r"budget: 'small': expected a size \(12MB\)"),
        ("version: 1\nbudget: -1", "budget: '-1': expected a size"),
        ("version: 1\nbudget: .inf", "budget: 'inf': expected a size"),
        ("version: 1\nbudget: .nan", "budget: 'nan': expected a size"),
        ("version: 1\nbudget: {size: 12MB}", "budget: expected a string, got a mapping"),
        ("version: 1\nplan: uniform:2", "plan: uniform:2: the ratio must be"),
        ("version: 1\nplan: 'uniform:'", "plan: 'uniform:': expected"),
        ("version: 1\nplan: dense:int5-b32", "plan: unknown core format 'int5-b32'"),
        ("version: 1\nplan: uniform:0.5\nbudget: 4bpw", "names both plan and budget"),
        ("version: 1\nheal: always", "heal: always: expected auto, off, a time"),
        ("version: 0x" + "F" * 4000, "r.yaml:1: a number of 4002 digits"),
        ("version: 1\nseed: -" + "9" * 5000, "r.yaml:2: a number of 5001 digits"),
        ("version: 1\ncalibration: " + "a" * 300, "calibration: no file '.*aaa"),
        ("version: 1\nmax_latency: 5", "max_latency: expected a string, got a number"),
        ("version: 1\nmax_latency: 0ms", "max_latency: '0ms': expected a time"),
        ("version: 1\nmax_latency: 5ms\nplan: uniform:0.5", "a plan already decides every layer"),
        ("version: 1\nsearch: random", "search: 'random': expected one of greedy, none, anneal"),
        ("version: 1\nheal_method: qlora", "heal_method: healing method 'qlora': expected full or lora"),
        ("version: 1\nseed: -1", "seed: expected a whole number from 0 on, got -1"),
        ("version: 1\nseed: true", "seed: expected a whole number from 0 on, got True"),
        ("version: 1\nseed: '7'", "seed: expected a whole number from 0 on, got '7'"),
        ("version: 1\narithmetic: fp8", "arithmetic: is int8 or packed, got 'fp8'"),
        ("version: 1\nheal: 10", "heal: expected a string, got a number"),
        ("version: 1\nmax_loss: 200%", "max_loss: max loss '200%': expected a share"),
        ("version: 1\nmax_loss: 1%\nbudget: 4bpw", "max_loss is instead of a budget or a plan"),
        ("version: 1\nheal: false", "heal: expected a string, got a boolean"),
        ("%YAML 1.1\n---\nversion: 1\nheal: off", "r.yaml:2: YAML 1.2 only"),
        ("version: 1\ndescription: 2026-01-01", "description: expected a string, got a date"),
        ("version: 1\nversion: 1", "not valid YAML"),
        ("version: 1\ntarget: &t onnx-x64\ndescription: *t", "r.yaml:3: aliases, merges and tags are not allowed"),
        ("version: 1\ntarget: !custom onnx-x64", "r.yaml:2: aliases, merges and tags are not allowed"),
        ("version: !!int 1", "r.yaml:1: aliases, merges and tags are not allowed"),
        ("version: 1\n---\nversion: 1", "not valid YAML"),
        ("version: 1\nbudget: " + "9" * 5000, "a number of 5000 digits"),
        ("[" * 1_000, "not valid YAML|nested"),
        ("version: 1\ndescription: " + "x" * 1_000_000, "more than the 1000000 bytes that are read"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_refusals_name_file_and_key(tmp_path: Path, body: str, says: str) -> None:
    assert re.search(says, refusal(write(tmp_path, body)))


def test_a_python_tag_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    assert "tags are not allowed" in refusal(write(tmp_path, f"version: 1\n{CALLS_HOME.format(mark)}\n"))
    assert not mark.exists()


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "none.yaml")
    assert "cannot be read" in refusal(tmp_path)
    raw = tmp_path / "raw.yaml"
    raw.write_bytes(b"version: 1\ndescription: \xff\n")
    assert "not valid YAML" in refusal(raw)


def test_options_override() -> None:
    text = Path("text.txt")
    recipe = Recipe(target="onnx-x64", budget="5bpw", description="why")
    assert recipe.merged() == recipe
    merged = recipe.merged(target="onnx-arm64", budget="4bpw", calibration=text)
    assert merged == Recipe(target="onnx-arm64", budget="4bpw", calibration=text, description="why")
    assert recipe.budget == "5bpw", "the recipe itself stays"
    assert Recipe().merged(target="onnx-x64", plan="uniform:0.5") == Recipe(target="onnx-x64", plan="uniform:0.5")


def test_a_budget_option_drops_the_recipes_plan_and_the_other_way_round() -> None:
    assert Recipe(plan="uniform:0.5").merged(budget="4bpw") == Recipe(budget="4bpw")
    assert Recipe(budget="4bpw").merged(plan="uniform:0.5") == Recipe(plan="uniform:0.5")
    capped = Recipe(budget="4bpw", max_latency="5ms", seed=3)
    assert capped.merged(plan="uniform:0.5") == Recipe(plan="uniform:0.5", seed=3)
    assert capped.merged(budget="5bpw", seed=0) == Recipe(budget="5bpw", max_latency="5ms", seed=0)
    both = Recipe(budget="4bpw").merged(plan="uniform:0.5", budget="12MB")
    assert (both.plan, both.budget) == ("uniform:0.5", "12MB"), "both given as options: not the recipe's to judge"


def test_a_recipe_is_frozen_and_versioned() -> None:
    with pytest.raises(FrozenInstanceError):
        Recipe().target = "onnx-x64"  # type: ignore[misc]
    assert Recipe().version == RECIPE_VERSION == 1
