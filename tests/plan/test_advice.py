"""The decision on made-up models: arithmetic to the byte, every verdict from limits that lead to it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from edgec.contraction import flops
from edgec.export.targets import get_target
from edgec.fit import contraction_of, stored_bytes
from edgec.modeling import Layer
from edgec.plan import advice, verdict
from edgec.plan.advice import (
    BUY_SMALLER,
    DEPLOY,
    GO_BACK,
    NOTHING,
    PIPELINE,
    QUANTIZATION,
    SMALLER,
    Alternative,
    Desk,
    Limits,
)
from edgec.plan.candidates import candidates
from edgec.plan.costs import Costs, Facts, Ram, Rate, milliseconds_of, parameters_that_fit, ram_of
from edgec.plan.hardware import KV_GGUF, KV_GGUF_SOURCE, of_target
from edgec.plan.kv_cache import CacheShape, Memory
from edgec.plan.planner import Sizes, constrained_plan, make_choice
from edgec.plan.verdict import Ground, Language
from edgec.quantize.formats import CoreFormat, LayerFormat
from edgec.records import Choice, LayerProfile

X64 = get_target("onnx-x64")
LAYERS = [
    Layer("embed", "embedding", (512, 128)),
    *(Layer(f"block.{i}.{n}", "linear", s) for i in range(2) for n, s in (("up", (256, 128)), ("down", (128, 256)))),
    Layer("head", "head", (512, 128), tied_to="embed"),
]
PARAMETERS = 512 * 128 + 4 * 128 * 256
FACTS = Facts("m", "text-generation", PARAMETERS, CacheShape(2, 2, 32), 128, 256, 4, 512, 64, 1, 10_000)
COSTS = Costs(
    1_000_000, 500_000, {32: Rate(0.4, 1.0), 16: Rate(0.4, 3.0), 8: Rate(0.1, 1.5), 4: Rate(0.05, 2.0)}, 1, 2, "x", True
)


@dataclass(frozen=True)
class Made:
    fingerprint: str
    layers: tuple[LayerProfile, ...]


def _loss(choice: Choice, *, factoring: float) -> float:
    bits = LayerFormat.parse(choice.format).of("backbone").bits
    whole = 2 * choice.shape[0] * choice.shape[1]
    kept = stored_bytes(choice.spec, choice.shape, choice.role, CoreFormat(16)) / whole
    return 4.0**-bits + factoring * max(0.0, 1 - kept) ** 2


def profile(factoring: float = 0.05) -> Made:
    made = []
    for layer in LAYERS:
        offered = candidates([X64], layer.role, layer.shape, tied=layer.tied_to is not None)
        choices = [make_choice(layer, spec, fmt) for spec, fmt in offered]
        scored = tuple(replace(c, loss=_loss(c, factoring=factoring), error=0.1) for c in choices)
        made.append(LayerProfile(layer.name, layer.role, layer.shape, {}, {}, (), False, layer.tied_to, scored))
    return Made("sha256:x", tuple(made))


def desk(
    ram: float = 1e9, ms: float | None = None, loss: float = 0.1, costs: Costs = COSTS, factoring: float = 0.05
) -> Desk:
    return Desk(profile(factoring), LAYERS, X64, FACTS, costs, Limits(ram, ms, loss, "x"), 0.0)


def ground(at: Desk, language: Language | None = None) -> Ground:
    fit = parameters_that_fit(at.weights_left, at.costs)
    return Ground(at.limits, "KL", at.least_ram(at.profile), fit, PARAMETERS, language)


def test_memory_and_time_are_the_sums_of_their_parts() -> None:
    plan = constrained_plan("dense:int8-b32", LAYERS, X64, "sha256:x", 10_000)
    ram = ram_of(plan, COSTS, FACTS, 777.0)
    table, linears = 512 * 128 * 34 // 32, 4 * 128 * 256 * 34 // 32
    assert ram.weights == table + linears + 10_000
    assert ram.extra == pytest.approx(0.5 * linears)  # the table is read in place, the tied head stores nothing
    assert ram.activations == 4 * (64 * (4 * 128 + 2 * 256) + 512)  # a block's, and one token's logits
    assert ram.total == pytest.approx(1_500_000 + ram.weights + ram.extra + 777 + ram.activations)
    assert milliseconds_of(plan.choices, COSTS) == pytest.approx((4 * 128 * 256 + 512 * 128) * 0.1e-6)


def test_a_factored_layer_costs_what_its_cores_do() -> None:
    choice = next(c for c in profile().layers[1].candidates if c.spec.kind == "svd" and c.format == "int4-b32")
    weights = flops(contraction_of(choice.spec, choice.shape, choice.role)) / 2
    assert COSTS.milliseconds(choice) == pytest.approx(weights * 0.05e-6)
    assert COSTS.resident(choice) == 2 * choice.bytes
    assert COSTS.rate(2) == COSTS.rates[4]  # the nearest that was measured
    own = replace(COSTS, named={"int4-b32": Rate(0.2, 1.0)})
    assert own.milliseconds(choice) == pytest.approx(weights * 0.2e-6)
    assert own.resident(choice) == choice.bytes


def test_parameters_that_fit_count_scales_and_packing() -> None:
    assert parameters_that_fit(8.5 * 1.5 * 1000 / 8, COSTS) == 1000
    assert parameters_that_fit(-1.0, COSTS) == 0


def test_node_1_says_what_each_level_prefers() -> None:
    sizes = Sizes(PARAMETERS, 10_000)
    node = advice.functional_node(profile(), X64, sizes, 0.05)
    assert [level.bpw for level in node.levels] == list(advice.LEVELS)
    reached = [level for level in node.levels if level.kinds is not None]
    assert reached
    assert all(sum((level.kinds or {}).values()) == node.linears == 4 for level in reached)
    assert reached[0].kinds == {"dense": 4}
    losses = [level.loss or 0.0 for level in reached]
    assert losses == sorted(losses)
    within = [level.bpw for level in reached if (level.loss or 0.0) <= 0.05]
    assert node.acceptable == min(within)
    assert advice.functional_node(profile(), X64, sizes, 1e-9).acceptable is None
    free = advice.functional_node(profile(factoring=0.0), X64, sizes, 1.0)
    assert any(set(level.kinds or {}) - {"dense"} for level in free.levels)


def test_an_unscored_choice_makes_a_loss_unknown_and_floats_add_nothing() -> None:
    unscored = make_choice(LAYERS[1], profile().layers[1].candidates[0].spec, CoreFormat.parse("int8-b32"))
    assert advice.predicted_loss([unscored]) is None
    assert advice.predicted_loss([replace(unscored, format="fp32")]) == 0
    assert advice.predicted_loss([replace(unscored, loss=0.25)]) == 0.25


def test_node_3_for_encoders_and_decoders() -> None:
    row = of_target(X64)
    node = advice.cache_node(FACTS, row.kv, row.kv_source, Memory(1e6), False)
    assert node.decision is not None
    assert (node.decision.placement, node.decision.precision) == ("device memory", "fp32")
    assert node.decision.bytes == 2 * 2 * 64 * 2 * 32 * 4
    encoder = advice.cache_node(replace(FACTS, cache=None), row.kv, row.kv_source, Memory(1e6), False)
    assert encoder.decision is None
    assert "no KV cache" in encoder.note


def test_node_3_takes_int8_before_it_looks_elsewhere_and_says_that_elsewhere_is_arithmetic() -> None:
    row = of_target(X64)
    whole = 2 * 2 * 64 * 2 * 32 * 4
    tight = advice.cache_node(FACTS, row.kv, row.kv_source, Memory(whole / 2), False)
    assert tight.decision is not None
    assert (tight.decision.placement, tight.decision.precision) == ("device memory", "int8")
    assert "edgec kv-cache" in tight.note and "arithmetic only" not in tight.note
    away = advice.cache_node(FACTS, KV_GGUF, KV_GGUF_SOURCE, Memory(0.0, host=1e9, pooled=1e9), False)
    assert away.decision is not None and "arithmetic only" in away.note
    assert {option.placement for option in away.decision.options} == {"device memory", "pooled (CXL)", "host offload"}
    assert {option.precision for option in away.decision.options} == {"fp16", "int8"}


def test_alternatives_stand_from_simple_to_complicated_and_searches_keep_the_limits() -> None:
    at = desk(ram=desk().uniform("int4-b32").ram.total)
    found = advice.alternatives(at)
    assert [a.what for a in found] == sorted((a.what for a in found), key=[NOTHING, QUANTIZATION, PIPELINE].index)
    by_name = {a.name: a for a in found}
    assert by_name["dense fp32"].loss == 0
    assert not by_name["dense fp32"].fits_ram
    for name in ("dense, bits by layer", "full pipeline"):
        assert by_name[name].fits_ram
        assert by_name[name].ram.total <= at.limits.ram
    assert by_name["dense, bits by layer"].factored == 0
    assert (by_name["full pipeline"].loss or 0) <= (by_name["dense, bits by layer"].loss or 0)


def test_measured_losses_replace_predicted_ones() -> None:
    at = desk()
    at.evaluate = lambda choices: 0.5
    assert (at.uniform("int8-b32").loss, at.uniform("int8-b32").loss_from) == (0.5, "measured")
    assert (at.uniform("fp32").loss, at.uniform("fp32").loss_from) == (0.0, "exact")
    full = at.searched("full", PIPELINE, at.profile)
    assert full is not None
    assert (full.loss, full.acceptable) == (0.5, False)


def test_times_of_a_busy_machine_only_count_when_they_pass() -> None:
    idle, busy = desk(ms=1e-6), desk(ms=1e-6, costs=replace(COSTS, load=5.0))
    assert idle.uniform("int8-b32").fits_latency is False
    assert busy.uniform("int8-b32").fits_latency is None
    assert desk(ms=1e3, costs=replace(COSTS, load=5.0)).uniform("int8-b32").fits_latency is True
    elsewhere = desk(ms=1e-6, costs=replace(COSTS, native=False)).uniform("int8-b32")
    assert (elsewhere.ms, elsewhere.fits_latency) == (None, None)


def _verdict(at: Desk, *more: Alternative, language: Language | None = None) -> advice.Verdict:
    return verdict.decide([*advice.alternatives(at), *more], ground(at, language))


def test_what_fits_as_it_is_is_deployed_as_it_is() -> None:
    found = _verdict(desk())
    assert found.decision == DEPLOY
    assert found.sentence.startswith("Deploy it as it is: dense fp32 keeps every limit")
    assert "would save" in found.sentence


def test_plain_quantization_is_said_to_be_the_better_buy() -> None:
    found = _verdict(desk(ram=desk().uniform("int8-b32").ram.total))
    assert found.decision == DEPLOY
    assert "plain quantization: dense int8-b32" in found.sentence


def test_factoring_wins_where_nothing_simpler_keeps_the_limits() -> None:
    at = desk(ram=desk().uniform("int4-b32").ram.total, loss=1e-4, factoring=0.0)
    found = _verdict(at)
    assert found.decision == DEPLOY
    assert found.sentence.startswith("Deploy edgec's plan: full pipeline")
    assert any("is better than quantization alone" in n for n in found.numbers)


def test_too_lossy_means_go_back_with_a_budget_that_works() -> None:
    at = desk(ram=desk().uniform("int4-b64").ram.total, loss=0.002, factoring=10.0)
    found = _verdict(at)
    assert found.decision == GO_BACK, found
    assert "raise --ram to " in found.sentence
    needed = at.least_ram(at.profile)
    assert needed is not None
    assert needed > at.limits.ram
    again = desk(ram=1.02 * needed, loss=0.002, factoring=10.0)
    assert any(a.viable for a in advice.alternatives(again))


def test_nothing_that_fits_means_a_smaller_model() -> None:
    found = _verdict(desk(ram=1_700_000))
    assert found.decision == BUY_SMALLER
    assert "no form of this one fits (" in found.sentence
    assert any("parameters fits at int8" in n for n in found.numbers)
    slow = _verdict(desk(ms=1e-7))
    assert slow.decision == BUY_SMALLER
    assert "ms given" in slow.sentence


def _small(total: float) -> Alternative:
    ram = Ram(0.0, total, 0.0, 0.0, 0.0)
    return Alternative("tiny", SMALLER, 1e5, ram, 1e-5, None, "estimate", "estimate", "", True, True, None)


def test_a_smaller_model_wins_only_by_measured_text() -> None:
    better, worse = Language(2.0, 1.9, 0.5), Language(2.0, 2.6, 0.5)
    assert _verdict(desk(), _small(1e5), language=better).decision == BUY_SMALLER
    found = _verdict(desk(), _small(1e5), language=worse)
    assert found.decision == DEPLOY
    assert any("bits per byte" in n and "2.6000" in n for n in found.numbers)
    encoders = _verdict(desk(), _small(1e5))
    assert encoders.decision == DEPLOY
    assert any("for you to judge" in n for n in encoders.numbers)


def test_a_bench_row_speaks_before_an_estimate_of_its_kind() -> None:
    row = Alternative(
        "dense int8 (bench)", QUANTIZATION, 1e5, Ram(0, 2e6, 0, 0, 0, measured=True), 1.0, 0.01, "measured", "measured",
        "measured", False, None, None,
    )  # fmt: skip
    at = desk(ram=desk().uniform("int8-b32").ram.total)
    plans = advice.alternatives(at)
    found = verdict.decide([*plans[:3], at.held(row), *plans[3:]], ground(at))
    assert "dense int8 (bench)" in found.sentence
    assert "measured loss 0.01" in found.sentence
