"""Plans from profiles that are made up: budgets kept, rivals tried, constraints obeyed, misfits named."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import landscapes_for_tests as landscapes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec.errors import BudgetError, PlanError, UsageError
from edgec.export.targets import get_target
from edgec.fit import stored_bytes
from edgec.modeling import Layer
from edgec.plan.budget import parse_budget
from edgec.plan.candidates import candidates
from edgec.plan.latency import Pace
from edgec.plan.planner import (
    Sizes,
    check_plan,
    constrained_plan,
    finalists,
    make_choice,
    plan_to_budget,
    protection_note,
)
from edgec.plan.refine import Search
from edgec.quantize.formats import CoreFormat
from edgec.records import Choice, LayerProfile, Plan, Spec, Target

X64, ARM64 = get_target("onnx-x64"), get_target("onnx-arm64")
LAYERS = [
    Layer("embed", "embedding", (512, 128)),
    *(Layer(f"block.{i}.{n}", "linear", s) for i in range(2) for n, s in (("up", (256, 128)), ("down", (128, 256)))),
    Layer("head", "head", (512, 128), tied_to="embed"),
]
MISLED = landscapes.truth({"svd int4": 0.35, "svd int8": 0.35, "residual int2+int8": 3.0}, {0: 4.0, 3: 0.5})
MADE = landscapes.profile()
PARAMETERS = 512 * 128 + 4 * 128 * 256
SIZES = Sizes(PARAMETERS, other_bytes=10_000)


@dataclass(frozen=True)
class Made:
    fingerprint: str
    layers: tuple[LayerProfile, ...]


def loss_of(choice: Choice, weight: float) -> float:
    """Falls with bits and with parameters kept, as real ones do."""
    fmt = CoreFormat.parse(choice.format.partition("+")[0])  # of a pair, the part that holds most of the numbers
    kept = stored_bytes(choice.spec, choice.shape, choice.role, CoreFormat(32)) / (
        4 * choice.shape[0] * choice.shape[1]
    )
    return weight * (4.0**-fmt.bits * (2 if fmt.block > 32 else 1) + 0.05 * max(0.0, 1 - kept) ** 2)


def profile(layers: list[Layer] | None = None, target: Target = X64, *, dull: tuple[str, ...] = ()) -> Made:
    made = []
    for number, layer in enumerate(layers or LAYERS):
        tied, dense_only = layer.tied_to is not None, layer.name in dull
        offered = candidates([target], layer.role, layer.shape, incompressible=dense_only, tied=tied)
        choices = [make_choice(layer, spec, fmt) for spec, fmt in offered]
        scored = tuple(replace(c, loss=loss_of(c, 1.0 + number), error=0.1) for c in choices)
        made.append(LayerProfile(layer.name, layer.role, layer.shape, {}, {}, (), dense_only, layer.tied_to, scored))
    return Made("sha256:x", tuple(made))


@settings(max_examples=12, deadline=None)
@given(bits=st.floats(3.0, 9.5))
def test_a_total_budget_is_never_exceeded(bits: float) -> None:
    budget = parse_budget(f"{bits}bpw")
    plan = plan_to_budget(profile(), X64, budget, SIZES)
    assert plan.bytes <= budget.model_bytes(PARAMETERS)
    assert [c.layer for c in plan.choices] == [layer.name for layer in LAYERS]
    check_plan(plan, LAYERS, X64, "sha256:x")


def test_more_budget_is_never_worse() -> None:
    losses = []
    for bits in (3, 3.5, 4, 4.5, 5, 6, 7, 8, 9):
        plan = plan_to_budget(profile(), X64, parse_budget(f"{bits}bpw"), SIZES)
        losses.append(sum(c.loss or 0.0 for c in plan.choices))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 100


def test_a_size_counts_the_files_beside_the_model() -> None:
    sizes = replace(SIZES, runtime_files=30_000)
    plan = plan_to_budget(profile(), X64, parse_budget("150KB"), sizes)
    assert plan.bytes <= 120_000
    ratio = plan_to_budget(profile(), X64, parse_budget("0.25"), SIZES)
    assert ratio.bytes <= 0.25 * 2 * PARAMETERS


def test_a_linear_budget_leaves_table_and_head_at_int8() -> None:
    plan = plan_to_budget(profile(), X64, parse_budget("4bpw-linear"), SIZES)
    assert 3.5 < plan.linear_bpw() <= 4
    by_layer = plan.by_layer()
    assert by_layer["embed"].format == by_layer["head"].format == "int8-b32"
    assert (by_layer["head"].bytes, by_layer["head"].spec.kind) == (0, "dense")


@pytest.mark.parametrize("kind", ["bpw", "bpw-linear", "MB", ""])
def test_below_the_floor_names_a_budget_that_works(kind: str) -> None:
    with pytest.raises(BudgetError, match=r"below the floor .* --budget (\S+)") as caught:
        plan_to_budget(profile(), X64, parse_budget(f"0.05{kind}"), SIZES)
    named = str(caught.value).rpartition(" ")[2]
    assert parse_budget(named).kind == parse_budget(f"1{kind}").kind
    plan_to_budget(profile(), X64, parse_budget(named), SIZES)


def test_incompressible_layers_stay_dense_and_are_noted() -> None:
    plan = plan_to_budget(profile(dull=("block.0.up",)), X64, parse_budget("4bpw"), SIZES)
    assert plan.by_layer()["block.0.up"].spec.kind == "dense"
    assert any(note.startswith("block.0.up: incompressible") for note in plan.notes)


def test_every_uniform_rival_is_tried_and_the_measured_best_wins() -> None:
    seen: list[list[Choice]] = []

    def evaluate(choices: list[Choice]) -> float:
        seen.append(choices)
        uniform = len({(c.spec.kind, c.format) for c in choices if c.role == "linear"}) == 1
        return 1.0 if not uniform else 0.5 - 0.001 * len(seen)

    budget = parse_budget("5bpw-linear")
    plan = plan_to_budget(profile(), X64, budget, SIZES, evaluate, Search("none"))
    assert len(seen) > 3
    for choices in seen:
        linears = [c for c in choices if c.role == "linear"]
        assert sum(c.bytes for c in linears) <= budget.linear_bytes(4 * 128 * 256)
    kinds = {tuple(sorted({(c.spec.kind, c.format) for c in choices if c.role == "linear"})) for choices in seen[1:]}
    assert (("dense", "int4-b32"),) in kinds
    assert any(kind == (("svd", "int8-b32"),) for kind in kinds)
    assert {c.layer: c for c in seen[-1]} == plan.by_layer()
    assert "chosen: uniform" in plan.notes[-1]


def test_the_search_says_what_it_gained() -> None:
    budget = parse_budget("3bpw-linear")
    plain = plan_to_budget(MADE, X64, budget, landscapes.SIZES, MISLED, Search("none"))
    plan = plan_to_budget(MADE, X64, budget, landscapes.SIZES, MISLED)
    assert MISLED(list(plan.choices)) < MISLED(list(plain.choices))
    assert plan.linear_bpw() <= 3
    bits, search, measured = plan.notes
    assert re.fullmatch(r"bits per weight: first block [\d.]+, last block [\d.]+, the others [\d.]+", bits)
    assert re.match(r"search: \d+ plans measured; the best has [\d.]+, [\d.]+ % lower than", search)
    assert measured.endswith("chosen: refined")
    assert [c.layer for c in plan.choices] == [layer.name for layer in landscapes.LAYERS]


def test_an_annealed_plan_needs_a_second_text() -> None:
    with pytest.raises(PlanError, match="give `confirm`"):
        plan_to_budget(profile(), X64, parse_budget("4bpw"), SIZES, MISLED, Search("anneal"))
    told = plan_to_budget(
        profile(), X64, parse_budget("4bpw"), SIZES, MISLED, Search("anneal", evaluations=12), confirm=MISLED
    ).notes
    assert any(note.startswith("annealing: ") for note in told)


def test_protection_is_read_off_the_plan() -> None:
    """Bits of the first, the last and the other blocks; of nothing else."""
    def choice(layer: str, size: int, role: str = "linear") -> Choice:
        return Choice(layer, role, (8, 8), Spec("dense"), "int8-b32", size, 0)

    layers = (choice("h.0.a", 64), choice("h.1.a", 16), choice("h.2.a", 32), choice("h.3.a", 8), choice("e", 1, "head"))
    plan = Plan("f", "onnx-x64", "x", layers)
    assert protection_note(plan) == ("bits per weight: first block 8.00, last block 1.00, the others 3.00",)
    assert protection_note(replace(plan, choices=layers[:2])) == ()


def test_finalists_differ_in_structure() -> None:
    budget = parse_budget("3bpw-linear")
    found = finalists(MADE, X64, budget, landscapes.SIZES, MISLED)
    by_name = {name: choices for name, choices, _ in found}
    assert set(by_name) >= {"mix", "dense", "factored"}
    assert [loss for *_, loss in found] == sorted(loss for *_, loss in found)
    for name, choices, loss in found:
        linears = [c for c in choices if c.role == "linear"]
        assert loss == MISLED(choices)
        assert sum(c.bytes for c in linears) <= budget.linear_bytes(landscapes.LINEAR_PARAMETERS)
        if name == "dense":
            assert {c.spec.kind for c in linears} <= {"dense", "disentangled"}
        if name == "factored":  # the small square ones have no factored form that saves anything
            assert all(c.spec.factored for c in linears if max(c.shape) > 128)


def test_what_cannot_be_had_is_no_finalist() -> None:
    """Eight bits are dense anyway, and two are below what dense forms reach."""
    names = lambda bits: {  # noqa: E731
        name for name, *_ in finalists(MADE, X64, parse_budget(bits), landscapes.SIZES, MISLED)
    }
    assert "dense" not in names("9bpw-linear")
    assert "dense" not in names("2bpw-linear")
    with pytest.raises(BudgetError, match="below the floor"):
        names("0.2bpw-linear")


def test_a_pace_is_kept() -> None:
    """A cap on milliseconds is a second budget; a price per millisecond moves the choice."""
    budget = parse_budget("4bpw-linear")

    def plan(pace: Pace | None) -> Plan:
        return plan_to_budget(MADE, X64, budget, landscapes.SIZES, MISLED, Search(evaluations=8), pace=pace)

    def ms(choice: Choice) -> float:
        return choice.flops / 1e6 * (2.0 if choice.format.startswith("int2") else 1.0)

    free = Pace(ms).of(plan(None).choices)
    capped = plan(Pace(ms, cap=0.8 * free))
    assert Pace(ms).of(capped.choices) <= 0.8 * free
    priced = plan(Pace(ms, weight=1.0))
    assert Pace(ms).of(priced.choices) < free
    assert max(capped.linear_bpw(), priced.linear_bpw()) <= 4
    with pytest.raises(BudgetError, match="no plan within the size budget takes less than"):
        plan(Pace(ms, cap=0.01 * free))


def test_a_target_is_offered_only_what_it_executes() -> None:
    """One profile scores the candidates of every target."""
    made = profile(target=X64)
    plan = plan_to_budget(made, ARM64, parse_budget("6bpw"), SIZES)
    assert {c.format for c in plan.choices} <= {"int4-b32", "int8-b32"}
    check_plan(plan, LAYERS, ARM64, "sha256:x")


# Constraints


@pytest.mark.parametrize("ratio", [0.4, 0.5, 0.8])
def test_uniform_halves_every_linear_and_the_head(ratio: float) -> None:
    plan = constrained_plan(f"uniform:{ratio}", LAYERS, X64, "sha256:x", 5)
    for choice in plan.choices:
        out, in_ = choice.shape
        if choice.role == "embedding":
            assert (choice.spec.kind, choice.format) == ("dense", "int4-b32")
            continue
        assert choice.spec.kind == "svd"
        assert choice.format == "int4-b32"
        assert choice.spec.ranks[0] * (out + in_) <= ratio * out * in_
    assert (plan.budget, plan.other_bytes) == (f"uniform:{ratio}", 5)
    check_plan(plan, LAYERS, X64, "sha256:x")


def test_dense_constraints_share_a_tied_table() -> None:
    for name in ("fp32", "fp16", "int8-b32", "int4-b64"):
        by_layer = constrained_plan(f"dense:{name}", LAYERS, X64, "x").by_layer()
        assert {c.spec.kind for c in by_layer.values()} == {"dense"}
        assert {c.format for c in by_layer.values() if c.role == "linear"} == {name}
        assert by_layer["head"].format == by_layer["embed"].format
        assert by_layer["head"].bytes == 0 < by_layer["embed"].bytes


def test_constraints_keep_tables_at_four_bits_or_more() -> None:
    by_layer = constrained_plan("dense:int2-b64", LAYERS, X64, "x").by_layer()
    assert by_layer["embed"].format == by_layer["head"].format == "int4-b32"
    assert by_layer["block.0.up"].format == "int2-b64"


def test_what_a_target_does_not_execute_is_refused_or_said() -> None:
    with pytest.raises(PlanError, match="onnx-arm64 executes no layer of this model in int2-b64"):
        constrained_plan("dense:int2-b64", LAYERS, ARM64, "x")
    odd = [*LAYERS, Layer("odd", "linear", (64, 70))]
    plan = constrained_plan("uniform:0.5", odd, ARM64, "x")
    assert plan.by_layer()["odd"].format == "fp16"
    assert any(note.startswith("odd: ") for note in plan.notes)


@pytest.mark.parametrize(
    "text",
    [
        "uniform",
        "uniform:",
        "uniform:0",
        "uniform:1.1",
        "uniform:-1",
        "uniform:nan",
        "uniform:x",
        "dense",
        "dense:",
        "x:0.5",
    ],
)
def test_constraints_that_mean_nothing(text: str) -> None:
    with pytest.raises(UsageError, match="--plan"):
        constrained_plan(text, LAYERS, X64, "x")


def test_constraints_with_unknown_formats() -> None:
    for text in ("dense:int5-b32", "uniform:0.5:int4"):
        with pytest.raises(PlanError, match="unknown core format"):
            constrained_plan(text, LAYERS, X64, "x")


# Checking


def test_plans_that_do_not_fit_are_refused_by_layer() -> None:
    plan = constrained_plan("uniform:0.5", LAYERS, X64, "sha256:x")

    def refused(match: str, **changes: object) -> None:
        choices = tuple(replace(c, **changes) if c.layer == "block.0.up" else c for c in plan.choices)  # type: ignore[arg-type]
        with pytest.raises(PlanError, match=match):
            check_plan(replace(plan, choices=choices), LAYERS, X64, "sha256:x")

    check_plan(plan, LAYERS, X64, "sha256:x")
    with pytest.raises(PlanError, match="plan again"):
        check_plan(plan, LAYERS, X64, "sha256:y")
    refused("does not have", layer="block.9.up")
    refused("the plan says linear", shape=(256, 256))
    refused("the plan says head", role="head")
    refused("'block.0.up': rank 129 .* 128, the cut's maximum", spec=Spec("svd", (129,)))
    refused("'block.0.up': onnx-x64 does not execute", spec=Spec("svd", (33,)))
    refused("'block.0.up': onnx-x64 does not execute", format="int4-b16")
    refused("unknown core format", format="int5-b32")
    table = tuple(replace(c, spec=Spec("svd", (32,))) if c.role == "embedding" else c for c in plan.choices)
    with pytest.raises(PlanError, match="'embed': a layer of role 'embedding' can be dense, table_svd"):
        check_plan(replace(plan, choices=table), LAYERS, X64, "sha256:x")
