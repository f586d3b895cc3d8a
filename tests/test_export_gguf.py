"""Whole exports to llama.cpp: plans obeyed, budgets kept, manifests true, what ships run and measured; the wall."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models_for_tests import folder_bytes, tree, write_causal_lm

from edgec import assess, pipeline
from edgec.bench.sizes import artifact_bytes
from edgec.errors import BudgetError, UnsupportedModelError, UsageError
from edgec.export.artifacts import ArtifactKind, kind_of
from edgec.export.targets import all_targets, get_target
from edgec.gguf_header import read_header
from edgec.heal.settings import HealSettings, parse_heal
from edgec.inspection import inspect
from edgec.plan.refine import Search
from edgec.records import Target
from edgec.runtime import open_artifact
from edgec.runtime.llama_cpp import LlamaCpp

pytestmark = pytest.mark.slow

pytest.importorskip("llama_cpp", reason="needs the extra edgec[gguf]")

OFF = HealSettings(mode="off")
NAMES = {"q_proj": "attn_q", "down_proj": "ffn_down"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for K types: 256 and 512, with a tied head."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    return write_causal_lm(folder, hidden_size=256, intermediate_size=512, num_attention_heads=8, num_hidden_layers=2)


@pytest.fixture(scope="module")
def profile(source: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the targets for llama.cpp alone, which is quicker than of all."""
    from edgec.pipeline.stages import make_profile
    from edgec.profile.store import save_profile
    from edgec.workspace import Workspace

    out = tmp_path_factory.mktemp("profile") / "profile"
    save_profile(make_profile(Workspace(source, text_file), [get_target("gguf-adapter")]), out)
    return out


def export(source: Path, out: Path, target: str = "gguf", **options: Any) -> pipeline.Exported:
    options = {"heal": OFF, "quality": False, "plain": "plan" in options, "search": Search("none"), **options}
    return pipeline.export(pipeline.ExportRequest(source, target, out, **options))


@pytest.mark.parametrize("target", all_targets().values(), ids=lambda t: t.name)
def test_every_target_names_a_kind_that_defines_everything(target: Target) -> None:
    kind = kind_of(target)
    wanted = {name for name in (*vars(ArtifactKind), *ArtifactKind.__annotations__) if not name.startswith("_")}
    assert wanted >= {"refuse_unsupported", "prepare", "other_bytes", "write", "write_companions", "parity"}
    assert not {name for name in wanted if not hasattr(kind, name)}


def test_an_unknown_kind_is_refused() -> None:
    from dataclasses import replace

    with pytest.raises(UsageError, match="unknown artifacts plugin 'tflite'; known: gguf"):
        kind_of(replace(get_target("gguf"), artifact="tflite"))


@pytest.mark.parametrize(
    ("plan", "kinds"),
    [
        ("dense:int4-b32", {"Q4_0"}),
        ("dense:int8-b32", {"Q8_0"}),
        ("dense:q3_k", {"Q3_K"}),
        ("dense:fp16", {"F16"}),
    ],
)
def test_a_plan_is_what_is_in_the_file(plan: str, kinds: set[str], source: Path, tmp_path: Path) -> None:
    made = export(source, tmp_path / "out", plan=plan)
    header = read_header(made.out / "model.gguf")
    matrices = {t.type_name for name, t in header.tensors.items() if name.startswith("blk") and len(t.shape) == 2}
    assert matrices == kinds
    assert {t.type_name for name, t in header.tensors.items() if "norm" in name} == {"F32"}
    assert "output.weight" not in header.tensors  # tied
    sizes = made.manifest["sizes"]
    assert sizes["model_bytes"] == (made.out / "model.gguf").stat().st_size == artifact_bytes(made.out)
    assert sizes["types"]["blk.0.ffn_down.weight"] in kinds
    assert made.manifest["parity"]["error"] < 2e-3
    assert made.manifest["parity"]["shipped"] < 0.1
    assert set(made.manifest["files"]) == {"model.gguf"}
    assert inspect(made.out, check=True).plan == made.plan


def test_a_type_that_does_not_divide_is_said_and_its_bits_are_true(
    lm_source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of 128: Q4_K falls back to Q5_0 in llama-quantize, at 5.5 bits."""
    with caplog.at_level(logging.WARNING):
        made = export(lm_source, tmp_path / "out", plan="dense:q4_k")
    assert "rows of 128 do not divide into q4_k; stored as Q5_0, 5.5 bits per weight" in caplog.text
    types = made.manifest["sizes"]["types"]
    assert types["blk.0.attn_q.weight"] == "Q5_0"
    assert types["blk.0.ffn_down.weight"] == "Q4_K"  # rows of 256
    choice = made.plan.by_layer()["model.layers.0.self_attn.q_proj"]
    assert (choice.format, choice.bytes) == ("q4_k", 128 * 128 * 22 // 32)


def test_the_shipped_file_answers_like_the_dense_model(source: Path, text_file: Path, tmp_path: Path) -> None:
    made = export(source, tmp_path / "out", plan="dense:int8-b32", calibration=text_file, quality=True)
    quality = made.manifest["quality"]
    assert 0 <= quality["kl"] < 0.02
    assert quality["top1"] > 0.9
    assessed = assess.evaluate(made.out, source, calibration=text_file)
    assert assessed["kl"] == pytest.approx(quality["kl"], rel=0.2)
    loaded = open_artifact(made.out)
    assert isinstance(loaded, LlamaCpp)
    assert len(list(loaded.generate("import os", 8))) <= 8


def test_a_budget_is_kept_by_types_that_differ_by_layer(
    source: Path, profile: Path, text_file: Path, tmp_path: Path
) -> None:
    made = export(source, tmp_path / "out", budget="4bpw", profile=profile, calibration=text_file)
    parameters = made.manifest["sizes"]["parameters"]
    assert 8 * (made.out / "model.gguf").stat().st_size <= 4 * parameters
    assert {c.spec.kind for c in made.plan.choices} == {"dense"}
    whole = export(source, tmp_path / "size", budget="600kB", profile=profile, calibration=text_file)
    assert folder_bytes(whole.out) <= 600_000
    with pytest.raises(BudgetError, match="floor"):
        export(source, tmp_path / "no", budget="1bpw", profile=profile, calibration=text_file)


def test_equal_inputs_give_equal_bytes(source: Path, profile: Path, text_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(source, tmp_path / name, budget="4bpw", profile=profile, calibration=text_file)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_healed_codes_ship_as_they_are(source: Path, text_file: Path, tmp_path: Path) -> None:
    """Parity compares the file with torch on the healed cores, so a lost step would fail the export."""
    heal = parse_heal("40steps")
    made = export(source, tmp_path / "out", plan="dense:int4-b32", heal=heal, calibration=text_file, plain=False)
    assert made.manifest["healing"]["curve"], "it healed, whether or not the result was kept"
    assert made.manifest["parity"]["error"] < 2e-3


def test_an_adapter_holds_the_corrections(source: Path, profile: Path, text_file: Path, tmp_path: Path) -> None:
    """A plan with corrections, by hand: backbones in model.gguf, factors in adapter.gguf; together as in torch."""
    from edgec.plan.files import write_plan
    from edgec.workspace import Workspace

    made = pipeline.explicit_plan(Workspace(source), "dense:q3_k", "gguf-adapter")
    text = write_plan(made)
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        start = text.index(f"  {layer}:")
        line = text[start : text.index("\n", start)]
        text = text.replace(line, f"  {layer}: {{kind: residual, ranks: [32], format: q2_k+int8-b32}}")
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    out = export(source, tmp_path / "out", "gguf-adapter", plan=str(path), calibration=text_file, plain=False).out
    adapter = read_header(out / "adapter.gguf")
    assert adapter.metadata["adapter.type"] == "lora"
    assert adapter.metadata["general.type"] == "adapter"
    shapes = {name: (t.shape, t.type_name) for name, t in adapter.tensors.items()}
    assert shapes == {
        "blk.0.attn_q.weight.lora_a": ((32, 256), "Q8_0"),
        "blk.0.attn_q.weight.lora_b": ((256, 32), "Q8_0"),
        "blk.1.ffn_down.weight.lora_a": ((32, 512), "Q8_0"),
        "blk.1.ffn_down.weight.lora_b": ((256, 32), "Q8_0"),
    }
    model = read_header(out / "model.gguf")
    assert model.tensors["blk.0.attn_q.weight"].type_name == "Q2_K"
    manifest = json.loads((out / "edgec.json").read_text(encoding="utf-8"))
    assert manifest["parity"]["error"] < 2e-3  # without the adapter it is above a hundredth
    files = sum((out / name).stat().st_size for name in ("model.gguf", "adapter.gguf"))
    assert manifest["sizes"]["model_bytes"] == files == artifact_bytes(out)
    ids = np.arange(5, 60)
    with_adapter = LlamaCpp(out).logits(ids)
    (out / "adapter.gguf").unlink()
    without = LlamaCpp(out).logits(ids)
    assert np.linalg.norm(with_adapter - without) > 0.01 * np.linalg.norm(without)


def test_an_adapter_ships_only_where_it_pays(
    source: Path, profile: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        made = export(
            source, tmp_path / "out", "gguf-adapter", budget="3bpw-linear", profile=profile, calibration=text_file
        )
    told = " ".join(made.plan.notes)
    if (made.out / "adapter.gguf").exists():
        assert "corrections pay: measured loss" in told
    else:
        assert "the plain file ships" in told
        assert "the plain file ships" in caplog.text
        assert {c.spec.kind for c in made.plan.choices} == {"dense"}


def test_a_compressed_folder_is_reconstructed_and_quantised_anew(
    source: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline.compress(source, tmp_path / "half", "uniform:0.5", calibration=text_file)
    with caplog.at_level(logging.WARNING):
        made = export(tmp_path / "half", tmp_path / "out", plan="dense:int8-b32")
    assert "has no factored layers; they are reconstructed" in caplog.text
    assert {t.type_name for t in read_header(made.out / "model.gguf").tensors.values()} == {"Q8_0", "F32"}


def test_a_compressed_folder_of_whole_matrices_ships_as_it_is(source: Path, text_file: Path, tmp_path: Path) -> None:
    pipeline.compress(source, tmp_path / "int4", "dense:q3_k", target="gguf", calibration=text_file)
    late = export(tmp_path / "int4", tmp_path / "late")
    direct = export(source, tmp_path / "direct", plan="dense:q3_k", calibration=text_file, plain=False)
    assert (late.out / "model.gguf").read_bytes() == (direct.out / "model.gguf").read_bytes()


def test_encoders_are_refused(encoder_source: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="causal LMs to GGUF"):
        export(encoder_source, tmp_path / "out", plan="dense:int8-b32")
    assert not (tmp_path / "out").exists()
