"""Whole exports of tiny models: budgets kept on disk, plans obeyed, manifests true, equal runs equal bytes."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_for_tests as onnx_files
import pytest
import torch
from models_for_tests import folder_bytes, set_weight, tree, write_causal_lm
from numpy.typing import NDArray

import edgec
from edgec import pipeline
from edgec.errors import BudgetError, EdgecError, PlanError, RecipeError, UsageError
from edgec.evaluate.embeddings import cosine
from edgec.export.targets import get_target
from edgec.export.verify import float_activations
from edgec.heal.settings import parse_heal
from edgec.modeling import DECODER_TASK, Layer
from edgec.pipeline import exporting, pace
from edgec.pipeline.stages import silent
from edgec.plan.budget import parse_budget
from edgec.plan.files import write_plan
from edgec.plan.latency import Sample
from edgec.plan.planner import Sizes, make_choice
from edgec.plan.refine import Search
from edgec.profile.store import load_profile
from edgec.quantize.formats import CoreFormat
from edgec.records import Plan, Spec
from edgec.runtime import open_artifact
from edgec.runtime.ort_decoder import OrtDecoder
from edgec.runtime.ort_encoder import OrtEncoder
from edgec.workspace import Workspace

Export = Callable[..., pipeline.Exported]
SENTENCES = [
    "The import system is described here.",
    "A list of names.",
    "Objects are compared by their value, if at all.",
]
IDS = np.arange(3, 43, dtype=np.int64)
BLOCK = "model.layers.0"


@pytest.fixture(scope="session")
def sources(encoder_source: Path, lm_source: Path) -> dict[str, Path]:
    return {"encoder": encoder_source, "lm": lm_source}


@pytest.fixture(scope="session")
def profiles(
    sources: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The profile folder of each model, made when first asked for."""
    base = tmp_path_factory.mktemp("profiles")

    def profile(name: str) -> Path:
        if not (base / name).exists():
            pipeline.profile(sources[name], base / name, calibration=text_file)
        return base / name

    return profile


@pytest.fixture(scope="session")
def export(
    sources: dict[str, Path],
    text_file: Path,
    profiles: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Export:
    """export("lm", "onnx-x64", plan="dense:fp32"): each different request once a session."""
    done: dict[Any, pipeline.Exported] = {}
    base = tmp_path_factory.mktemp("exports")

    def make(name: str, target: str = "onnx-x64", **options: Any) -> pipeline.Exported:
        key = (name, target, *sorted(options.items()))
        if key not in done:
            found = None if "plan" in options else profiles(name)
            request = pipeline.ExportRequest(
                sources[name], target, base / f"{len(done)}", calibration=text_file, profile=found, **options
            )
            done[key] = pipeline.export(request)
        return done[key]

    return make


@pytest.fixture(scope="session")
def edited(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A plan file: dense int4 everywhere but for the layers given as (kind, ranks, format)."""
    base = tmp_path_factory.mktemp("plans")

    def write(name: str, changes: dict[str, tuple[str, tuple[int, ...], str]], start: str = "dense:int4-b32") -> Path:
        made = pipeline.explicit_plan(Workspace(sources[name]), start, "onnx-x64")
        body = re.sub(
            r"^  ([\w.]+): \{.*\}$", lambda match: _line(match, changes), write_plan(made), flags=re.MULTILINE
        )
        path = base / f"{len(list(base.iterdir()))}.yaml"
        path.write_text(body, encoding="utf-8")
        return path

    return write


def _line(match: re.Match[str], changes: dict[str, tuple[str, tuple[int, ...], str]]) -> str:
    """A layer's line as a person would edit it: kind, ranks and format; sizes are left to be computed again."""
    if match[1] not in changes:
        return match[0]
    kind, ranks, fmt = changes[match[1]]
    listed = f", ranks: [{', '.join(map(str, ranks))}]" if ranks else ""
    return f"  {match[1]}: {{kind: {kind}{listed}, format: {fmt}}}"


def _model_bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data") if (folder / name).exists())


def _parameters(source: Path) -> int:
    """Distinct parameters, as torch counts them."""
    model = Workspace(source).model
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def _logits(model: Any, ids: NDArray[np.int64] = IDS) -> NDArray[np.float32]:
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return found


def _relative(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


# --- constraints -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dense:fp32", "dense:int4-b32", "uniform:0.5"])
def test_an_encoder_embeds_like_the_dense_model(export: Export, encoder_source: Path, plan: str) -> None:
    done = export("encoder", plan=plan)
    loaded = open_artifact(done.out)
    assert isinstance(loaded, OrtEncoder)
    workspace = Workspace(encoder_source)
    tokens = workspace.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = workspace.model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    similar = cosine(loaded.embed(SENTENCES), expected)
    assert similar.min() > {"dense:fp32": 1 - 1e-6, "dense:int4-b32": 0.99, "uniform:0.5": 0.8}[plan]
    assert done.manifest["parity"]["error"] < 1e-4
    assert done.manifest["quality"]["cosine"] > 0.9


@pytest.mark.parametrize("plan", ["dense:fp32", "dense:int4-b32", "uniform:0.5"])
def test_a_causal_lm_generates_and_agrees_with_its_compressed_self(
    export: Export, lm_source: Path, text_file: Path, tmp_path: Path, plan: str
) -> None:
    done = export("lm", plan=plan)
    generated = list(open_artifact(done.out).generate("The ", 8))  # type: ignore[union-attr]
    assert len(generated) == 8
    pipeline.compress(lm_source, tmp_path / "compressed", plan, calibration=text_file)
    expected = _logits(edgec.load(tmp_path / "compressed"))
    with float_activations(done.out) as plain:
        assert _relative(OrtDecoder(plain).logits(IDS), expected) < 1e-5
    if plan == "dense:fp32":
        assert _relative(_logits(Workspace(lm_source).model), expected) < 1e-6


def test_a_constraint_that_no_runtime_here_executes_is_refused(export: Export) -> None:
    """Silently keeping every layer at fp16 would be several times the bytes that were asked for."""
    with pytest.raises(EdgecError, match=r"onnx-arm64.*int2-b64|int2-b64.*onnx-arm64"):
        export("lm", "onnx-arm64", plan="dense:int2-b64")


# --- budgets ---------------------------------------------------------------------------------------------------------

BUDGETS = ["240kB", "0.42", "6bpw", "3bpw-linear", "4.6bpw-linear"]


@pytest.mark.slow
@pytest.mark.parametrize("budget", BUDGETS)
def test_what_is_written_never_exceeds_the_budget(export: Export, lm_source: Path, budget: str) -> None:
    done = export("lm", budget=budget, quality=False)
    parameters = _parameters(lm_source)
    if budget.endswith("kB"):
        assert folder_bytes(done.out) <= 240_000
        assert folder_bytes(done.out) > 150_000  # and is spent
    elif budget.endswith("linear"):
        linears = [c.layer for c in done.plan.choices if c.role == "linear"]
        assert len(linears) == 14
        shapes = [c.shape for c in done.plan.choices if c.role == "linear"]
        bits = 8 * onnx_files.layer_bytes(done.out, linears) / sum(out * in_ for out, in_ in shapes)
        assert 0.85 * float(budget.split("bpw")[0]) < bits <= float(budget.split("bpw")[0])
        assert bits == pytest.approx(done.manifest["sizes"]["linear_bpw"])
    elif budget.endswith("bpw"):
        assert 0.85 * 6 * parameters / 8 < _model_bytes(done.out) <= 6 * parameters / 8
    else:
        assert 0.85 * 0.42 * 2 * parameters < _model_bytes(done.out) <= 0.42 * 2 * parameters


def test_an_encoders_budget_counts_the_whole_folder(export: Export) -> None:
    done = export("encoder", budget="210kB")
    assert 150_000 < folder_bytes(done.out) <= 210_000
    assert done.plan.budget == "210kB"


@pytest.mark.parametrize("budget", ["20kB", "0.01", "0.5bpw", "1bpw-linear"])
def test_a_budget_below_the_floor_names_the_floor(
    export: Export, lm_source: Path, text_file: Path, profiles: Callable[[str], Path], tmp_path: Path, budget: str
) -> None:
    request = pipeline.ExportRequest(
        lm_source, "onnx-x64", tmp_path / "out", budget, calibration=text_file, profile=profiles("lm"), quality=False
    )
    with pytest.raises(BudgetError, match=r"below the floor.*--budget") as caught:
        pipeline.export(request)
    assert tree(tmp_path) == {}
    named = re.search(r"--budget (\S+)", str(caught.value))
    assert named, caught.value
    assert export("lm", budget=named[1].rstrip("."), quality=False).out.is_dir()  # what it names is enough


def test_every_try_leaves_more_room(
    encoder_source: Path,
    text_file: Path,
    profiles: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another plan has another graph around it, and may be over the budget again by as much as the one before."""
    rooms: list[int] = []
    real = exporting.search_plan

    def search(workspace: Any, found: Any, target: Any, goal: Any, sizes: Sizes, *rest: Any) -> Plan:
        rooms.append(sizes.other_bytes)
        return real(workspace, found, target, goal, sizes, *rest)

    monkeypatch.setattr(exporting, "search_plan", search)
    overruns = iter([1000.0, 900.0, 800.0])
    monkeypatch.setattr("edgec.pipeline.exporting._Export._overrun", lambda *arguments: next(overruns, -1.0))
    request = pipeline.ExportRequest(
        encoder_source,
        "onnx-x64",
        tmp_path / "out",
        "5bpw",
        calibration=text_file,
        profile=profiles("encoder"),
        heal=parse_heal("off"),
        search=Search("none"),
        quality=False,
    )
    pipeline.export(request)
    assert np.diff(rooms).tolist() == [1064, 2 * 964, 4 * 864]


def test_plan_and_budget_together_are_refused(lm_source: Path, tmp_path: Path) -> None:
    request = pipeline.ExportRequest(lm_source, "onnx-x64", tmp_path / "out", "4bpw", "dense:fp32")
    with pytest.raises(UsageError, match=r"--plan.*--budget"):
        pipeline.export(request)


# --- manifest and bytes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_encoder_multiplies_as_it_is_told(export: Export) -> None:
    for arithmetic, product in [(None, "MatMulIntegerToFloat"), ("packed", "MatMulNBits")]:
        done = export("encoder", plan="dense:int4-b32", arithmetic=arithmetic)
        assert done.manifest["arithmetic"] == (arithmetic or "int8")
        kinds = {node.op_type for node in onnx_files.load(done.out).graph.node}
        assert product in kinds and not {"MatMulIntegerToFloat", "MatMulNBits"} - {product} & kinds
    with pytest.raises(UsageError, match="for encoders"):
        export("lm", plan="dense:int4-b32", arithmetic="int8")
    with pytest.raises(UsageError, match="ONNX encoders"):
        export("encoder", "gguf", plan="dense:int4-b32", arithmetic="int8")
    with pytest.raises(UsageError, match="int8 or packed"):
        export("encoder", plan="dense:int4-b32", arithmetic="fp4")


@pytest.mark.parametrize("name", ["encoder", "lm"])
def test_the_manifest_is_true(export: Export, sources: dict[str, Path], name: str) -> None:
    done = export(name, plan="uniform:0.5")
    manifest = json.loads((done.out / "edgec.json").read_text(encoding="utf-8"))
    assert manifest == json.loads(json.dumps(done.manifest))
    files = {n: h for n, h in tree(done.out).items() if h != "dir" and n != "edgec.json"}
    assert manifest["files"] == files
    assert manifest["fingerprint"] == Workspace(sources[name]).checkpoint.fingerprint == manifest["plan"]["fingerprint"]
    assert manifest["versions"]["onnxruntime"] == version("onnxruntime")
    assert manifest["edgec"] == edgec.__version__
    assert manifest["target"] == "onnx-x64"
    sizes = manifest["sizes"]
    assert sizes["model_bytes"] == _model_bytes(done.out)
    assert sizes["parameters"] == _parameters(sources[name])
    assert sizes["total_bpw"] == pytest.approx(8 * _model_bytes(done.out) / sizes["parameters"])
    planned = {c["layer"]: c for c in manifest["plan"]["choices"]}
    modules: dict[str, list[str]] = {}
    for layer, counted in sizes["layers"].items():
        assert planned[layer]["bytes"] in (counted, 0), layer
        modules.setdefault(layer.rpartition(".")[0], []).append(layer)
    for module, layers in modules.items():  # within one, products of one input may be stored as one
        assert sum(sizes["layers"][layer] for layer in layers) == onnx_files.layer_bytes(done.out, layers), module
    assert 0 < manifest["parity"]["error"] < manifest["parity"]["shipped"] < 0.1
    assert manifest["quality"]["text"] == "text.txt, validate split"
    assert not any("/tmp" in line for line in (done.out / "edgec.json").read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("name", ["encoder", "lm"])
def test_a_folder_holds_what_its_runtime_needs_and_no_trace_of_the_machine(export: Export, name: str) -> None:
    out = export(name, plan="uniform:0.5").out
    expected = {"model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json", "config.json", "edgec.json"}
    assert set(tree(out)) >= expected | ({"genai_config.json"} if name == "lm" else set())
    raw = (out / "model.onnx").read_bytes()
    for trace in (b"/tmp", b"/work", b"site-packages", b"name_scopes"):
        assert trace not in raw


@pytest.mark.slow
def test_the_same_export_twice_gives_the_same_bytes(
    export: Export, lm_source: Path, text_file: Path, tmp_path: Path
) -> None:
    """From scratch: no profile folder, nothing cached, another output name."""
    first = export("lm", budget="6bpw")
    again = pipeline.export(
        pipeline.ExportRequest(lm_source, "onnx-x64", tmp_path / "other-name", "6bpw", calibration=text_file)
    )
    assert tree(again.out) == tree(first.out)


# --- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["encoder", "lm"])
def test_no_tensor_of_a_truncated_layers_dense_shape(export: Export, tmp_path: Path, name: str) -> None:
    """Neither in the file nor in what onnxruntime makes of it, as constant or as intermediate result."""
    done = export(name, plan="uniform:0.5:fp32", quality=False)
    truncated = [c for c in done.plan.choices if c.spec.ranks]
    assert len(truncated) >= 10
    dense = {shape for c in truncated for shape in (c.shape, c.shape[::-1])}
    kept = {c.shape for c in done.plan.choices if not c.spec.ranks}
    for model in (onnx.load(done.out / "model.onnx"), onnx_files.optimised(done.out, tmp_path)):
        found = [(value, shape) for value, shape in onnx_files.shapes(model) if shape in dense - kept]
        assert not found


@pytest.mark.parametrize("plan", ["dense:int4-b32", "dense:int8-b32", "dense:fp32"])
def test_a_tied_head_and_table_share_their_bytes(export: Export, plan: str) -> None:
    done = export("lm", plan=plan)
    stored = onnx_files.stored(done.out)
    places = {name: s.place for name, s in stored.items() if s.place and s.bytes >= 320 * 128 // 2}
    head = {place for name, place in places.items() if "lm_head" in name}
    table = {place for name, place in places.items() if "embed_tokens" in name}
    assert len(head | table) == 1, places
    by_layer = done.plan.by_layer()
    assert by_layer["lm_head"].bytes == 0
    assert by_layer["model.embed_tokens"].bytes >= 320 * 128 // 2
    assert (done.out / "model.onnx.data").stat().st_size < sum(s.bytes for s in stored.values())


def test_an_edited_plan_is_obeyed_and_q_k_v_may_differ(export: Export, edited: Callable[..., Path]) -> None:
    attention = f"{BLOCK}.self_attn"
    plan = edited(
        "lm",
        {
            f"{attention}.q_proj": ("svd", (64,), "int4-b32"),
            f"{attention}.k_proj": ("dense", (), "int8-b128"),
            f"{attention}.v_proj": ("dense", (), "fp16"),
            f"{attention}.o_proj": ("svd", (32,), "fp32"),
        },
    )
    done = export("lm", plan=str(plan))
    q = onnx_files.nodes(done.out, "MatMulNBits", f"{attention}.q_proj/")
    assert [(n["K"], n["N"], n["bits"]) for n in q] == [(128, 64, 4), (64, 128, 4)]
    (k,) = onnx_files.nodes(done.out, "MatMulNBits", f"{attention}.k_proj/")
    assert (k["K"], k["N"], k["bits"], k["block_size"]) == (128, 64, 8, 128)
    assert [n["name"] for n in onnx_files.nodes(done.out, "MatMul", f"{attention}.v_proj/")]
    assert not onnx_files.nodes(done.out, "MatMulNBits", f"{attention}.v_proj/")
    assert len(onnx_files.nodes(done.out, "MatMul", f"{attention}.o_proj/")) == 2
    chosen = done.plan.by_layer()
    assert chosen[f"{attention}.q_proj"].spec == Spec("svd", (64,))
    assert chosen[f"{attention}.q_proj"].bytes == onnx_files.layer_bytes(done.out, [f"{attention}.q_proj"])
    assert chosen["model.layers.1.self_attn.q_proj"].spec == Spec("dense")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("svd", (129,), "fp32"), r"rank.*(128|129)"),
        (("svd", (33,), "int4-b32"), r"does not execute"),
        (("svd", (32,), "int2-b64"), r"does not execute"),
        (("dense", (), "int4-b16"), r"does not execute"),
        (("svd", (32, 32), "fp32"), r"rank"),
        (("tucker9", (32,), "fp32"), r"unknown kind"),
        (("dense", (), "int5-b32"), r"unknown core format"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_layer(
    lm_source: Path, edited: Callable[..., Path], tmp_path: Path, change: tuple[str, tuple[int, ...], str], reason: str
) -> None:
    layer = f"{BLOCK}.self_attn.q_proj"
    request = pipeline.ExportRequest(lm_source, "onnx-x64", tmp_path / "out", plan=str(edited("lm", {layer: change})))
    with pytest.raises((PlanError, RecipeError), match=f"{layer}.*{reason}"):
        pipeline.export(request)
    assert tree(tmp_path) == {}


def test_a_plan_of_another_checkpoint_is_refused(lm_source: Path, edited: Callable[..., Path], tmp_path: Path) -> None:
    other = write_causal_lm(tmp_path / "other")
    set_weight(other, "layers.0.mlp.up_proj.weight", 0.5)
    request = pipeline.ExportRequest(other, "onnx-x64", tmp_path / "out", plan=str(edited("lm", {})))
    with pytest.raises(PlanError, match=r"the plan is for sha256:.*this checkpoint is sha256:"):
        pipeline.export(request)


def test_random_matrices_are_called_incompressible_and_stay_dense(
    export: Export, lm_source: Path, text_file: Path, profiles: Callable[[str], Path]
) -> None:
    found = load_profile(profiles("lm"))
    random = {layer.name for layer in found.layers if layer.incompressible}
    assert random == {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"}
    for budget in ("6bpw", "3bpw-linear"):
        plan = export("lm", budget=budget, **({} if budget == "6bpw" else {"quality": False})).plan
        assert all(choice.spec.kind == "dense" for choice in plan.choices if choice.layer in random)
        for name in random:
            assert any(name in note and "incompressible" in note for note in plan.notes)


# --- compressed folders ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "lm"])
def test_a_compressed_folder_exports_to_what_the_plan_gives_directly(
    export: Export, sources: dict[str, Path], text_file: Path, tmp_path: Path, name: str
) -> None:
    plan = "uniform:0.5"
    pipeline.compress(sources[name], tmp_path / "compressed", plan, calibration=text_file)
    direct = export(name, plan=plan)
    request = pipeline.ExportRequest(tmp_path / "compressed", "onnx-x64", tmp_path / "out", calibration=text_file)
    late = pipeline.export(request)
    assert late.manifest["sizes"]["layers"] == direct.manifest["sizes"]["layers"]
    assert late.manifest["sizes"]["model_bytes"] == direct.manifest["sizes"]["model_bytes"]
    assert late.manifest["fingerprint"] == direct.manifest["fingerprint"]
    model = edgec.load(tmp_path / "compressed")
    if name == "lm":
        with float_activations(late.out) as plain:
            assert _relative(OrtDecoder(plain).logits(IDS), _logits(model)) < 1e-5
        assert _relative(OrtDecoder(late.out).logits(IDS), OrtDecoder(direct.out).logits(IDS)) < 1e-5
    else:
        ids = torch.from_numpy(IDS)[None]
        with torch.no_grad():
            assert torch.isfinite(model(input_ids=ids).last_hidden_state).all()
        assert _relative(OrtEncoder(late.out).embed(SENTENCES), OrtEncoder(direct.out).embed(SENTENCES)) < 1e-5


def test_quality_of_a_compressed_folder_is_not_claimed_against_itself(lm_source: Path, tmp_path: Path) -> None:
    """Its densified weights are no reference: divergence from them is only what int8 activations add."""
    pipeline.compress(lm_source, tmp_path / "compressed", "uniform:0.5", plain=True)
    with pytest.raises(UsageError, match="for encoders"):
        pipeline.export(
            pipeline.ExportRequest(tmp_path / "compressed", "onnx-x64", tmp_path / "out", arithmetic="int8")
        )
    done = pipeline.export(pipeline.ExportRequest(tmp_path / "compressed", "onnx-x64", tmp_path / "out"))
    assert done.manifest["quality"] == {}
    assert any("edgec eval out --model" in note for note in done.plan.notes)


# --- arm64 -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"plan": "uniform:0.5"}, {"budget": "6bpw"}, {"plan": "dense:int4-b32"}])
def test_arm64_gets_four_bits_by_default_blocks_of_32_and_whole_multiples(
    export: Export, options: dict[str, str]
) -> None:
    done = export("lm", "onnx-arm64", **options)
    matmuls = onnx_files.nodes(done.out, "MatMulNBits")
    assert matmuls
    for node in matmuls:
        assert node["bits"] == 4 or (node["bits"] == 8 and "budget" in options), node  # 4 by default, 8 where it pays
        assert node["block_size"] == 32, node
        assert node["K"] % 32 == 0, node
        assert node["accuracy_level"] == 4
    assert all(n["block_size"] == 32 and n["bits"] != 2 for n in onnx_files.nodes(done.out, "GatherBlockQuantized"))
    assert all(rank % 32 == 0 for choice in done.plan.choices for rank in choice.spec.ranks)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("svd", (48,), "int4-b32"), "rank 48"),
        (("dense", (), "int8-b128"), "block 128"),
        (("dense", (), "int2-b64"), "2 bits"),
        (("dense", (), "int4-b64"), "block 64"),
    ],
)
def test_arm64_refuses_what_its_kernels_do_not_run(
    lm_source: Path, edited: Callable[..., Path], tmp_path: Path, change: tuple[str, tuple[int, ...], str], why: str
) -> None:
    layer = f"{BLOCK}.mlp.up_proj"
    request = pipeline.ExportRequest(lm_source, "onnx-arm64", tmp_path / "out", plan=str(edited("lm", {layer: change})))
    with pytest.raises(PlanError, match=f"{layer}.*onnx-arm64 does not execute"):
        pipeline.export(request)


def test_arm64_leaves_widths_that_are_no_multiple_of_32_in_fp16_and_says_so(text_file: Path, tmp_path: Path) -> None:
    source = write_causal_lm(tmp_path / "odd", intermediate_size=112)
    request = pipeline.ExportRequest(
        source, "onnx-arm64", tmp_path / "out", plan="dense:int4-b32", calibration=text_file, plain=True, quality=False
    )
    done = pipeline.export(request)
    chosen = done.plan.by_layer()
    assert chosen[f"{BLOCK}.mlp.down_proj"].format == "fp16"  # K = 112
    assert chosen[f"{BLOCK}.mlp.up_proj"].format == "int4-b32"  # K = 128
    assert all(node["K"] % 32 == 0 for node in onnx_files.nodes(done.out, "MatMulNBits"))
    assert any("down_proj" in note and "fp16" in note for note in done.plan.notes)


@pytest.mark.slow
def test_a_cap_on_milliseconds_gives_a_quicker_plan(
    sources: dict[str, Path], profiles: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that take as long as they read bytes, on whatever machine the test runs."""
    shapes = ((64, 512), (384, 384), (1536, 384), (384, 1536), (1024, 1024))
    samples = [
        (n, k, name, rows, 1e-6 * CoreFormat.parse(name).stored_bytes((n, k)) + 1e-4)
        for name in ("int2-b64", "int4-b32", "int8-b32", "fp32")
        for n, k in shapes
        for rows in (1, 16, 128)
    ]
    monkeypatch.setattr(pace.microbench, "measure", lambda **given: samples)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")

    def planned(max_ms: float | None) -> Plan:
        goal = pipeline.Goal(parse_budget("9bpw"), search=Search("none"), max_ms=max_ms)
        return pipeline.plan(sources["encoder"], "onnx-x64", goal, profile_folder=profiles("encoder"))

    def read(plan: Plan) -> int:
        return sum(c.bytes for c in plan.choices if c.role != "embedding")

    free = planned(None)
    costs = pace.fit_costs(samples)
    ms = sum(costs.choice(choice, 128) for choice in free.choices)
    capped = planned(0.8 * ms)
    assert sum(costs.choice(choice, 128) for choice in capped.choices) <= 0.8 * ms
    assert read(capped) < read(free)
    with pytest.raises(BudgetError, match="raise the latency"):
        planned(ms / 100)


def test_milliseconds_of_another_machine_are_refused(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    goal = pace.paced(pipeline.Goal(parse_budget("4bpw")), get_target("onnx-x64"), "x", silent)
    assert goal.pace is None
    with pytest.raises(UsageError, match="does not run onnx-x64"):
        pace.paced(pipeline.Goal(max_ms=1.0), get_target("onnx-x64"), "x", silent)


def test_gguf_types_are_priced_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types of equal bits whose kernels differ, on whatever machine the test runs."""
    asked: list[str] = []

    def measured(formats: tuple[str, ...], **given: Any) -> list[Sample]:
        asked.extend(formats)
        slow = {"iq4_xs": 3.0}
        return [
            (n, k, name, rows, 1e-8 * n * k * rows * slow.get(name, 1.0) + 1e-4)
            for name in formats
            for n, k in ((64, 512), (384, 1536), (1024, 1024))
            for rows in (1, 16, 128)
        ]

    monkeypatch.setattr(pace.microbench_ggml, "measure", measured)
    goal = pace.paced(pipeline.Goal(max_ms=1.0), get_target("gguf"), DECODER_TASK, silent)
    assert goal.pace is not None and goal.pace.cap == 1.0
    assert asked == list(get_target("gguf").dense_formats)
    layer = Layer("model.layers.0.mlp.up_proj", "linear", (512, 512))
    ms = {
        name: goal.pace.ms(make_choice(layer, Spec("dense"), CoreFormat.parse(name))) for name in ("q4_k", "iq4_xs")
    }
    assert 2 < ms["iq4_xs"] / ms["q4_k"] < 4
