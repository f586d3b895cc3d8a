"""Scores are what they say, candidates that cannot win are left out, and a profile folder holds all of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from edgec import calibration, modeling
from edgec.checkpoint import Checkpoint, open_checkpoint
from edgec.errors import NumericsError, OutputError, ProfileError
from edgec.export.targets import all_targets
from edgec.fit import FactorCache
from edgec.modeling import Layer
from edgec.moments import smoothed
from edgec.plan.candidates import candidates
from edgec.pooling import Pooling
from edgec.profile.activations import Statistics
from edgec.profile.profiler import Scorer, build_profile
from edgec.profile.store import Profile, load_profile, save_profile
from edgec.quantize.formats import CoreFormat
from edgec.records import Spec

INT4 = CoreFormat.parse("int4-b32")


@pytest.fixture(scope="module")
def checkpoint(encoder_source: Path) -> Checkpoint:
    return open_checkpoint(encoder_source)


@pytest.fixture(scope="module")
def profile(checkpoint: Checkpoint) -> Profile:
    model = modeling.load_dense(checkpoint)
    batches = calibration.tokenize(
        calibration.load_text().split("calibrate"),
        calibration.load_tokenizer(checkpoint),
        modeling.ENCODER_TASK,
        2560,
        context=64,
    )
    target = all_targets()["onnx-x64"]

    def offered(layer: Layer, incompressible: bool) -> list[tuple[Spec, CoreFormat]]:
        return candidates([target], layer.role, layer.shape, incompressible=incompressible)[:12]

    return build_profile(
        model, checkpoint, modeling.layers(model), batches, pooling=Pooling("mean", True), candidates=offered
    )


def white(width: int, out: int) -> Statistics:
    h, g = np.eye(width, dtype=np.float32), np.eye(out, dtype=np.float32)
    return Statistics({"x": h}, {"x": g}, 100)


def test_white_statistics_make_errors_frobenius() -> None:
    weight = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    scorer = Scorer(Layer("x", "linear", weight.shape), weight, white(64, 48))
    for spec, fmt in [(Spec("dense"), INT4), (Spec("svd", (16,)), INT4), (Spec("dense"), CoreFormat(16))]:
        choice, difference = scorer.choice(spec, fmt), weight - scorer.draft(spec, fmt).dense()
        assert choice.error == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(weight), rel=1e-4)
        assert choice.loss == pytest.approx(0.5 * np.linalg.norm(difference) ** 2, rel=1e-4)
        assert choice.bytes == scorer.draft(spec, fmt).stored_bytes
    assert scorer.choice(Spec("svd", (16,)), INT4).flops == 2 * 16 * (48 + 64)


def test_table_errors_are_weighed_by_how_often_rows_are_read() -> None:
    table = np.random.default_rng(0).standard_normal((100, 32)).astype(np.float32)
    frequencies = np.zeros(100, np.float32)
    frequencies[[3, 4]] = 0.75, 0.25
    statistics = Statistics({"x": frequencies}, {"x": np.eye(32, dtype=np.float32)}, 100)
    scorer = Scorer(Layer("x", "embedding", (100, 32)), table, statistics)
    choice, difference = scorer.choice(Spec("dense"), INT4), table - scorer.draft(Spec("dense"), INT4).dense()
    squares = (difference**2).sum(1)
    assert choice.loss == pytest.approx(0.5 * float(smoothed(frequencies) @ squares), rel=1e-4)
    whole = 0.75 * (table[3] ** 2).sum() + 0.25 * (table[4] ** 2).sum()
    assert choice.error == pytest.approx(np.sqrt((0.75 * squares[3] + 0.25 * squares[4]) / whole), rel=1e-4)


def test_zero_weights_score_zero() -> None:
    scorer = Scorer(Layer("x", "linear", (32, 64)), np.zeros((32, 64), np.float32), white(64, 32))
    for spec in (Spec("dense"), Spec("svd", (8,))):
        choice = scorer.choice(spec, INT4)
        assert (choice.error, choice.loss) == (0.0, 0.0)


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = np.ones((32, 64), np.float32)
    weight[3, 3] = np.inf
    with pytest.raises(NumericsError, match="NaN or Inf"):
        Scorer(Layer("x", "linear", (32, 64)), weight, white(64, 32))


def test_trains_are_scored_only_where_they_find_something() -> None:
    generator = np.random.default_rng(0)
    spec = Spec("tensor_train", (16,), ((8, 8), (8, 8)))
    noise = generator.standard_normal((64, 64)).astype(np.float32)
    kron = np.kron(generator.standard_normal((8, 8)), generator.standard_normal((8, 8))).astype(np.float32)
    for weight, kept in [(noise, 0), (kron, 1)]:
        scorer = Scorer(Layer("x", "linear", (64, 64)), weight, white(64, 64))
        assert len(scorer.score([(spec, INT4)])) == kept


def test_a_decomposition_that_does_not_converge_leaves_the_layer_dense(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def diverges(*_: Any, **__: Any) -> Any:
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr("scipy.linalg.eigh", diverges)
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    scorer = Scorer(Layer("x", "linear", (64, 64)), weight, white(64, 64))
    found = scorer.score([(Spec("dense"), INT4), (Spec("svd", (16,)), INT4)])
    assert [c.spec.kind for c in found] == ["dense"]
    assert "'x': svd χ=16 in int4-b32 is left out" in caplog.text


def test_fitted_candidates_are_cached_up_to_a_size() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    cache = FactorCache(cap_bytes=40_000)
    scorer = Scorer(Layer("x", "linear", (64, 64)), weight, white(64, 64), cache)
    first = scorer.draft(Spec("dense"), CoreFormat(32))
    assert scorer.draft(Spec("dense"), CoreFormat(32)) is first
    for rank in (8, 16, 24, 32, 40):
        scorer.draft(Spec("svd", (rank,)), CoreFormat(32))
    assert scorer.draft(Spec("dense"), CoreFormat(32)) is not first
    assert cache._bytes <= 40_000


def test_a_profile_knows_random_layers_from_structured_ones(profile: Profile) -> None:
    for layer in profile.layers:
        random = "attention.self" in layer.name or "attention.output.dense" in layer.name
        assert layer.incompressible == (random and layer.role == "linear"), layer.name
        if layer.incompressible:
            assert all(c.spec.kind == "dense" for c in layer.candidates)
        assert layer.candidates
        assert all(c.loss is not None and c.loss >= 0 for c in layer.candidates)


def test_more_bits_cost_less_quality(profile: Profile) -> None:
    for layer in profile.layers:
        by_format = {c.format: c for c in layer.candidates if c.spec.kind == "dense"}
        errors = [by_format[name].error for name in ("fp32", "fp16", "int8-b32", "int4-b32") if name in by_format]
        assert errors == sorted(errors), layer.name  # type: ignore[type-var]


def test_a_broken_layer_is_named(checkpoint: Checkpoint) -> None:
    model: Any = modeling.load_dense(checkpoint)
    name = "encoder.layer.1.output.dense"
    model.get_parameter(f"{name}.weight").data[0, 0] = torch.inf
    with pytest.raises(NumericsError, match="layer|finite"):
        build_profile(
            model,
            checkpoint,
            [layer for layer in modeling.layers(model) if layer.name == name],
            calibration.Batches("x", (calibration.pad([[5, 6, 7]]),)),
            pooling=Pooling(),
            candidates=lambda layer, incompressible: [],
        )


# The folder


def test_a_profile_comes_back_as_it_was_saved(profile: Profile, checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_profile(replace(profile, targets=("onnx-x64", "gguf")), tmp_path / "p")
    found = load_profile(tmp_path / "p", checkpoint)
    assert found.targets == ("onnx-x64", "gguf")
    assert (found.fingerprint, found.calibration, found.tokens) == (
        profile.fingerprint,
        profile.calibration,
        profile.tokens,
    )
    assert found.layers == profile.layers
    assert found.statistics.sentences == profile.statistics.sentences > 0
    for field in ("second_moments", "curvatures", "mean_moments", "mean_curvatures"):
        arrays, expected = getattr(found.statistics, field), getattr(profile.statistics, field)
        assert set(arrays) == set(expected)
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, expected[name])
    query, key = (found.statistics.moment(f"encoder.layer.0.attention.self.{n}") for n in ("query", "key"))
    assert query is key


def test_equal_profiles_are_equal_bytes(profile: Profile, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_profile(profile, tmp_path / name)
    for file in ("profile.json", "statistics.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    with pytest.raises(OutputError, match="already exists"):
        save_profile(profile, tmp_path / "a")
    save_profile(profile, tmp_path / "a", force=True)


def test_a_stale_profile_is_refused(profile: Profile, checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_profile(profile, tmp_path / "p")
    shutil.copytree(checkpoint.folder, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = {name: array.copy() for name, array in load_file(file).items()}
    tensors["encoder.layer.0.output.dense.weight"][0, 0] += 1
    file.unlink()
    save_file(tensors, file)
    with pytest.raises(ProfileError, match="stale; run `edgec profile"):
        load_profile(tmp_path / "p", open_checkpoint(tmp_path / "m"))
    assert load_profile(tmp_path / "p").fingerprint == profile.fingerprint


@pytest.mark.parametrize(
    "ruin",
    [
        lambda p: (p / "profile.json").unlink(),
        lambda p: (p / "statistics.safetensors").unlink(),
        lambda p: (p / "profile.json").write_text("[]"),
        lambda p: (p / "profile.json").write_text("{"),
        lambda p: (p / "statistics.safetensors").write_bytes(b"junk"),
        lambda p: save_file({"x": np.ones(3)}, p / "statistics.safetensors"),
        lambda p: edit(p, version=1),
        lambda p: edit(p, layers=[{"name": "x"}]),
        lambda p: edit(p, aliases={"H:x": "H:nowhere"}),
        lambda p: edit(p, tokens="many"),
        lambda p: edit(p, layers=3),
    ],
    ids=range(11),
)
def test_a_damaged_profile_is_refused(ruin: Any, profile: Profile, tmp_path: Path) -> None:
    save_profile(profile, tmp_path / "p")
    ruin(tmp_path / "p")
    with pytest.raises(ProfileError):
        load_profile(tmp_path / "p")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "profile.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
