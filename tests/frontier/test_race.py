"""Verdicts, pools and healing, with a planner and a healer that do exactly what a test wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgec.errors import BudgetError
from edgec.export.targets import get_target
from edgec.fit import Factors, fit
from edgec.frontier.judge import Judge, spread
from edgec.frontier.planning import Planned, Planner, mixture
from edgec.frontier.race import SLACK, Race, Vectors, beside_linears
from edgec.profile.activations import collect
from edgec.profile.store import Profile
from edgec.quantize.formats import CoreFormat
from edgec.records import Spec
from edgec.report.frontier_records import AHEAD, ALONE, BEHIND, NOISE
from edgec.workspace import Workspace

TARGET = get_target("onnx-x64")
MakeRace = Callable[[], Race]


@pytest.fixture(scope="module")
def workspace(lm_source: Path, text_file: Path) -> Workspace:
    return Workspace(lm_source, text_file)


@pytest.fixture(scope="module")
def make_race(workspace: Workspace) -> MakeRace:
    batches = workspace.batches("calibrate", 4096)
    statistics = collect(workspace.model, workspace.layers, batches, pooling=None, curvature=False)
    found = Profile(workspace.checkpoint.fingerprint, batches.origin, statistics.tokens, (), statistics)
    judge = Judge(workspace, sts=None, eval_text=None, tokens=2048)
    return lambda: Race(workspace, TARGET, found, judge, lambda stage, done, total: None)


def _planner(workspace: Workspace, name: str, *, size: float = 1.0) -> Planner:
    """Every linear at one format, claiming `size` times its bytes."""

    def plan(budget: str) -> Planned:
        fmt = CoreFormat.parse(name)
        linears = [layer for layer in workspace.layers if layer.role == "linear"]
        factors = {layer.name: fit(workspace.weight(layer.name), Spec("dense"), fmt) for layer in linears}
        return Planned(name, factors, int(size * sum(f.stored_bytes for f in factors.values())), name)

    return plan


def test_a_better_plan_is_ahead_and_a_worse_one_behind(make_race: MakeRace, workspace: Workspace) -> None:
    race = make_race()
    race.edgec(_planner(workspace, "int8-b32", size=0.3), {2.5: "2.5bpw-linear"})  # int8 quality for 2.55 bits
    race.edgec(_planner(workspace, "int2-b128", size=4), {8.0: "8bpw-linear"})  # int2 quality for 8.5 bits
    race.peers(("rtn",), ())
    ahead, behind = race.verdicts()
    assert (ahead.verdict, behind.verdict) == (AHEAD, BEHIND)
    assert ahead.high is not None and ahead.high < 0
    assert behind.rival == "RTN int8-b32"
    assert ahead.rival is not None and "int2" in ahead.rival
    assert ahead.rival_bpw is not None and ahead.rival_bpw <= (1 + SLACK) * ahead.plan_bpw


def test_the_same_numbers_are_within_the_noise(make_race: MakeRace, workspace: Workspace) -> None:
    race = make_race()
    race.edgec(_planner(workspace, "int8-b32"), {9.0: "9bpw-linear"})
    race.peers(("rtn",), ())
    (verdict,) = race.verdicts()
    assert (verdict.rival, verdict.verdict) == ("RTN int8-b32", NOISE)
    assert verdict.difference == 0 == verdict.low == verdict.high


def test_a_plan_below_every_peer_stands_alone(make_race: MakeRace, workspace: Workspace) -> None:
    race = make_race()
    race.edgec(_planner(workspace, "int2-b128", size=0.1), {0.2: "0.2bpw-linear"})
    race.peers(("rtn",), ())
    (verdict,) = race.verdicts()
    assert (verdict.rival, verdict.verdict, verdict.difference) == (None, ALONE, None)


def test_points_say_what_they_are(make_race: MakeRace, workspace: Workspace) -> None:
    race = make_race()
    race.peers(("rtn", "svd", "gptq"), (4.0,))
    by_name = {p.name: p for p in race.points}
    assert len(by_name) == len(race.points)
    assert by_name["RTN int8-b32"].linear_bpw == 8.5
    assert by_name["SVD + int8 at 4"].linear_bpw <= 4
    assert by_name["RTN int8-b32"].figures["kl"] < by_name["RTN int4-b32"].figures["kl"]
    assert by_name["GPTQ int2-b64"].figures["kl"] < by_name["RTN int2-b64"].figures["kl"]
    for point in race.points:
        assert point.figures["kl_low"] <= point.figures["kl"] <= point.figures["kl_high"]
        assert point.simulated == ("int3" in point.name)


def test_healing_gives_the_rivals_the_same(make_race: MakeRace, workspace: Workspace) -> None:
    """A healer that brings the dense weights back: plan and rivals, dense and factored, gain a healed row each."""
    seen: list[int] = []

    def healer(factors: Mapping[str, Factors]) -> tuple[Mapping[str, Factors], Vectors]:
        seen.append(len(factors))
        exact = {
            name: fit(workspace.weight(name), Spec("dense"), CoreFormat(32), role=_role(workspace, name))
            for name in factors
        }
        return exact, {}

    race = make_race()
    race.edgec(_planner(workspace, "int4-b32"), {4.5: "4.5bpw-linear"})
    race.peers(("rtn", "svd"), (4.0,))
    race.heal(healer)
    healed = [p for p in race.points if p.healed]
    assert [p.family for p in healed] == ["edgec", "RTN", "SVD"]
    assert all(p.figures["kl"] == pytest.approx(0, abs=1e-6) for p in healed)
    assert set(seen) == {len(workspace.layers)}
    before, after = race.verdicts()
    assert before.rival is not None and "healed" not in before.rival
    assert after.plan == "edgec 4.5, healed"
    assert (after.verdict, after.plan_bpw) == (NOISE, 32)  # sizes are those of what came out of the healer
    assert after.rival is not None and "healed" in after.rival


def _role(workspace: Workspace, name: str) -> str:
    return next(layer.role for layer in workspace.layers if layer.name == name)


def test_what_cannot_run_is_skipped_and_said(
    make_race: MakeRace, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgec.errors import RuntimeUnavailableError
    from edgec.peers import ggml

    def unavailable() -> ggml.Ggml:
        raise RuntimeUnavailableError("llama.cpp's types need llama-cpp-python")

    def below(budget: str) -> Planned:
        raise BudgetError("below the floor of this model")

    monkeypatch.setattr(ggml, "library", unavailable)
    race = make_race()
    race.edgec(below, {0.1: "0.1bpw-linear"})
    race.peers(("ggml",), ())
    assert race.points == ()
    assert race.verdicts() == ()
    assert race.skipped == [
        "edgec at 0.1 bits: below the floor of this model",
        "llama.cpp: llama.cpp's types need llama-cpp-python",
    ]


def test_tables_and_heads_are_int8_for_all(workspace: Workspace) -> None:
    choices = beside_linears(workspace.layers, TARGET)
    assert {c.role for c in choices} == {"embedding", "head"}
    assert {c.format for c in choices} == {"int8-b32"}
    narrow = [replace(layer, shape=(300, 20), tied_to=None) for layer in workspace.layers if layer.role == "embedding"]
    assert [c.format for c in beside_linears(narrow, TARGET)] == ["fp16"]


def test_evaluation_rows_come_from_the_whole_text(workspace: Workspace) -> None:
    whole = workspace.batches("calibrate", 1 << 20)
    rows = np.concatenate([b["input_ids"].numpy() for b in whole.items if b["input_ids"].shape[1] == 256])
    part = spread(whole, 1024)
    picked = np.concatenate([b["input_ids"].numpy() for b in part.items])
    assert part.tokens == 1024
    places = [int(np.flatnonzero((rows == row).all(1))[0]) for row in picked]
    assert places == [i * len(rows) // 4 for i in range(4)]
    assert spread(part, 1 << 20) is part


def test_mixture_counts_and_cuts() -> None:
    assert mixture(["b", "a", "b"]) == "2× b, 1× a"
    assert mixture(list("abcdef")) == "1× a, 1× b, 1× c, 1× d, 2 more"
