"""Whatever is wrong with the request or the checkpoint: one line, an exit code, and earlier output untouched."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from command_for_tests import Said, check_failure, invoke
from models_for_tests import edit_json, ruined, set_weight, tree, write_causal_lm

from edgec import modeling, pipeline
from edgec.plan.files import write_plan
from edgec.workspace import Workspace

PLAIN = ("--plan", "dense:fp32", "--plain", "--no-quality")
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model(lm_source: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama to ruin."""
    return ruined(lm_source, tmp_path / "model")


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """Where output goes: it already holds an earlier one, which a failing run must not touch."""
    earlier = tmp_path / "room" / "out"
    earlier.mkdir(parents=True)
    (earlier / "edgec.json").write_text("{}", encoding="utf-8")
    (earlier / "model.onnx").write_bytes(b"earlier")
    return earlier.parent


@pytest.fixture
def export(room: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`edgec export MODEL` over the earlier output; whatever it says, the room is as it was."""

    def run(source: Path, *words: str | Path) -> Said:
        before = tree(room)
        chosen = words if "--target" in words or "-t" in words else ("-t", "onnx-x64", *words)
        said = invoke(capsys, "export", source, "-o", room / "out", "--force", *chosen)
        assert tree(room) == before
        return said

    return run


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _lying_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def _config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def _garbage(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text("{not json", encoding="utf-8")


CHECKPOINTS = {
    "no folder": (shutil.rmtree, r"model: no such folder; expected a transformers folder"),
    "no config": (_remove("config.json"), r"no config\.json"),
    "no weights": (_remove("model.safetensors"), r"no model\.safetensors"),
    "only pickles": (_only_pickles, r"only pickled weights .*safe_serialization"),
    "broken config": (_garbage("config.json"), r"config\.json: not JSON"),
    "truncated weights": (_truncate, r"model\.safetensors: tensor .* needs \d+ bytes"),
    "lying header": (_lying_header, r"model\.safetensors: header claims 4611686018427387904 bytes"),
    "unknown class": (_config(architectures=["NoSuchModel"]), r"unknown architecture 'NoSuchModel'"),
    "no class": (_config(architectures=[]), r"no architectures"),
    "unknown type": (_config(model_type="llama99"), r"unknown architecture 'llama99'"),
    "other task": (_config(architectures=["LlamaForSequenceClassification"]), r"text-classification"),
    "other shapes": (_config(intermediate_size=384), r"tensor '.*' is \[\d+, \d+\], config\.json makes it"),
    "missing tensors": (_config(num_hidden_layers=3), r"9 tensors are missing, first 'model\.layers\.2\."),
    "nonsense size": (_config(vocab_size=-5), r"(vocab_size|vocabulary) is -5"),
    "a size that is text": (_config(hidden_size="many"), r"config\.json"),
    "already quantised": (_config(quantization_config={"quant_method": "gptq"}), r"already quantised"),
    "head_dim 12": (_config(head_dim=12), r"head_dim 12.*multiples of 8.*GGUF"),
    "an activation nobody has": (_config(hidden_act="snake"), r"snake"),
}


@pytest.mark.parametrize("fault", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_used(export: Callable[..., Said], model: Path, fault: str) -> None:
    ruin, message = CHECKPOINTS[fault]
    ruin(model)
    check_failure(export(model, *PLAIN), 1, message)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj.weight", "layers.0.input_layernorm.weight"])
def test_a_weight_that_is_no_number_is_named(
    export: Callable[..., Said], model: Path, name: str, value: float, kind: str
) -> None:
    full = set_weight(model, name, value)
    check_failure(export(model, *PLAIN), 1, f"tensor '{full}' holds {kind}")


def test_a_compressed_folder_is_checked_like_a_checkpoint(
    export: Callable[..., Said], lm_source: Path, tmp_path: Path
) -> None:
    pipeline.compress(lm_source, tmp_path / "compressed", "uniform:0.5", plain=True)
    set_weight(tmp_path / "compressed", "input_layernorm.weight", float("nan"))
    check_failure(export(tmp_path / "compressed"), 1, r"tensor 'model\.layers\.0\.input_layernorm\.weight' holds NaN")
    check_failure(
        export(tmp_path / "compressed", "--plan", "dense:fp32"), 2, r"compressed is already compressed; --plan"
    )
    edit_json(tmp_path / "compressed" / "config.json", edgec={"version": 1, "plan": {"choices": [{"layer": 3}]}})
    check_failure(export(tmp_path / "compressed"), 1, r"config\.json: the edgec section is damaged")
    edit_json(tmp_path / "compressed" / "config.json", edgec={"version": 99})
    check_failure(export(tmp_path / "compressed"), 1, r"not a folder that this version of `edgec compress` wrote")


@pytest.mark.parametrize("name", ["layers.0.input_layernorm.weight", "layers.0.mlp.up_proj.weight"])
def test_compress_refuses_a_weight_that_is_no_number(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, name: str
) -> None:
    full = set_weight(model, name, float("inf"))
    words = ("compress", model, "--plan", "uniform:0.5", "--plain", "-o", tmp_path / "out")
    check_failure(invoke(capsys, *words), 1, f"tensor '{full}' holds Inf")
    assert not (tmp_path / "out").exists()


def test_what_a_runtime_cannot_execute_is_refused_before_any_work(
    export: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole point is not to find out after an hour: nothing is read, built or calibrated first."""
    source = write_causal_lm(tmp_path / "odd", head_dim=20)
    for name in ("check_finite", "read"):
        monkeypatch.setattr(f"edgec.checkpoint.Checkpoint.{name}", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr(modeling, "load_dense", lambda *_: pytest.fail("work began"))
    check_failure(export(source), 1, r"head_dim 20.*16 or 24 would do.*GGUF target")


REQUESTS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "unknown target": (("-t", "onnx-riscv", *PLAIN), 2, r"unknown target 'onnx-riscv'; known: gguf, .*onnx-x64"),
    "unreadable budget": (("--budget", "lots"), 2, r"budget 'lots': expected a size"),
    "zero budget": (("--budget", "0"), 2, r"budget '0'"),
    "plan and budget": ((*PLAIN, "--budget", "4bpw"), 2, r"--plan already decides"),
    "no such plan": (("--plan", "nowhere.yaml"), 2, r"nowhere\.yaml: no such file, and not a constraint"),
    "ratio above one": (("--plan", "uniform:1.5"), 2, r"the ratio must be a number in \(0, 1\]"),
    "unknown format": (("--plan", "dense:int5"), 1, r"unknown core format 'int5'"),
    "a format of other hardware": (("-t", "onnx-arm64", "--plan", "dense:int2-b64"), 1, r"onnx-arm64.*int2-b64"),
    "no such recipe": (("--recipe", "nowhere.yaml"), 1, r"nowhere\.yaml"),
    "no such text": (("--plan", "dense:int4-b32", "--calibration", "nowhere.txt"), 1, r"nowhere\.txt: cannot be read"),
    "no such profile": (("--profile", "nowhere"), 1, r"nowhere"),
    "unknown option": (("--bits", "4"), 2, r"No such option: --bits.*see `edgec export --help`"),
}


@pytest.mark.parametrize("fault", REQUESTS)
def test_a_request_that_cannot_be_meant(export: Callable[..., Said], model: Path, fault: str) -> None:
    words, code, message = REQUESTS[fault]
    check_failure(export(model, *words), code, message)


def test_no_target_at_all(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    check_failure(invoke(capsys, "export", model), 2, r"--target is missing; `edgec targets`")


def test_a_recipe_with_an_unknown_key(export: Callable[..., Said], model: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("version: 1\ntarget: onnx-x64\nbugdet: 4bpw\n", encoding="utf-8")
    check_failure(export(model, "--recipe", tmp_path / "r.yaml"), 1, r"r\.yaml: unknown key 'bugdet'; known: .*budget")


def test_a_plan_with_a_rank_above_its_cuts_maximum(export: Callable[..., Said], model: Path, tmp_path: Path) -> None:
    text = write_plan(pipeline.explicit_plan(Workspace(model), "uniform:0.5", "onnx-x64"))
    (tmp_path / "plan.yaml").write_text(text.replace("ranks: [32]", "ranks: [160]", 1), encoding="utf-8")
    check_failure(
        export(model, "--plan", tmp_path / "plan.yaml"), 1, rf"plan\.yaml: layer '{LAYER}': rank 160 .* 1 … 128"
    )


def test_a_plan_for_a_layer_that_is_not_there(export: Callable[..., Said], model: Path, tmp_path: Path) -> None:
    text = write_plan(pipeline.explicit_plan(Workspace(model), "uniform:0.5", "onnx-x64"))
    (tmp_path / "plan.yaml").write_text(text.replace(LAYER, "model.layers.7.gate"), encoding="utf-8")
    check_failure(
        export(model, "--plan", tmp_path / "plan.yaml"), 1, r"layer 'model\.layers\.7\.gate' is not in the model"
    )


def test_a_budget_below_the_floor(export: Callable[..., Said], model: Path, text_file: Path) -> None:
    said = export(model, "--budget", "9kB", "--calibration", text_file)
    check_failure(said, 1, r"budget 9kB is below the floor .* Raise it to --budget 0\.\d+MB")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Too short to mean anything, as it is.\n" * 9, r"leave the \w+ split empty; give more with --calibration"),
        (b"\n\n".join(b"Item %d of too few words." % i for i in range(40)), r"tokens; at least 2048 are needed"),
        (b"\xff\xfe not text", r"not UTF-8"),
        (b"", r"leave the \w+ split empty"),
    ],
)
def test_text_that_cannot_calibrate(
    export: Callable[..., Said], model: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    check_failure(export(model, "--budget", "6bpw", "--calibration", tmp_path / "text.txt"), 1, message)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_does_not_load(export: Callable[..., Said], model: Path, text_file: Path, name: str) -> None:
    _garbage(name)(model)
    said = export(model, "--plan", "dense:int4-b32", "--calibration", text_file)
    check_failure(said, 1, r"model: no tokenizer that loads|tokenizer")


def test_no_tokenizer_where_text_is_needed(export: Callable[..., Said], model: Path, text_file: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    check_failure(export(model, "--budget", "6bpw", "--calibration", text_file), 1, r"model: no tokenizer")


def test_existing_output_is_kept_unless_forced(
    capsys: pytest.CaptureFixture[str], model: Path, room: Path, tmp_path: Path
) -> None:
    before = tree(tmp_path)
    words = ("export", model, "-t", "onnx-x64", *PLAIN, "-o")
    check_failure(invoke(capsys, *words, room / "out"), 1, r"out: already exists; .*--force")
    check_failure(invoke(capsys, *words, model, "--force"), 1, r"model: --force replaces folders that edgec wrote")
    check_failure(
        invoke(capsys, *words, model / "config.json", "--force"), 1, r"config\.json: exists and is not a folder"
    )
    check_failure(
        invoke(capsys, *words, model / "config.json" / "out"),
        1,
        r"out: cannot be written \((File exists|Not a directory)",
    )
    (tmp_path / "link").symlink_to(room / "out")
    check_failure(invoke(capsys, *words, tmp_path / "link", "--force"), 1, r"link: exists and is not a folder")
    (tmp_path / "link").unlink()
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_a_profile_of_another_target_or_checkpoint_is_refused(
    export: Callable[..., Said], model: Path, text_file: Path, tmp_path: Path
) -> None:
    pipeline.profile(model, tmp_path / "profile", targets=["onnx-arm64"], calibration=text_file)
    said = export(model, "--budget", "6bpw", "--profile", tmp_path / "profile")
    check_failure(said, 1, r"made for onnx-arm64, not for onnx-x64; run `edgec profile` again with --target onnx-x64")
    set_weight(model, "layers.0.mlp.up_proj.weight", 0.25)
    said = export(model, "--budget", "6bpw", "--profile", tmp_path / "profile")
    check_failure(said, 1, r"the profile is of sha256:.*stale; run `edgec profile")
    (tmp_path / "profile" / "profile.json").write_text("[]", encoding="utf-8")
    said = export(model, "--budget", "6bpw", "--profile", tmp_path / "profile")
    check_failure(said, 1, r"profile: not a readable edgec profile")


def test_code_in_a_checkpoint_is_never_run(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text_file: Path
) -> None:
    """auto_map in all three places where transformers would follow it, and modules beside it that leave a mark."""
    mark = tmp_path / "executed"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (model / name).write_text(f"open({str(mark)!r}, 'w').close()\n", encoding="utf-8")
    edit_json(
        model / "config.json",
        auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "configuration_evil.Evil"},
    )
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})
    (model / "generation_config.json").write_text(
        json.dumps({"custom_generate": "modeling_evil", "eos_token_id": 2}), encoding="utf-8"
    )
    said = invoke(
        capsys, "export", model, "-t", "onnx-x64", "--plan", "dense:int4-b32", "--calibration", text_file,
        "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert said.code == 0, said
    assert not mark.exists()
    for name in ("config.json", "tokenizer_config.json"):
        assert "evil" not in (tmp_path / "out" / name).read_text(encoding="utf-8")
    assert not list((tmp_path / "out").glob("*.py"))
    edit_json(model / "config.json", architectures=["EvilForCausalLM"])
    check_failure(invoke(capsys, "profile", model), 1, r"unknown architecture 'EvilForCausalLM'")
    assert not mark.exists()


def test_hostile_names_reach_the_terminal_harmless(model: Path, tmp_path: Path, export: Callable[..., Said]) -> None:
    said = export(tmp_path / "no\x1b[31m\u202esuch\nmodel", *PLAIN)
    check_failure(said, 1, r"no�\[31m�such model: no such folder")
    full = "layers.0.mlp.up_proj.weight"
    file = model / "model.safetensors"
    raw = file.read_bytes().replace(full.encode(), b"layers.0.mlp.up_\\u001b[1m.w")
    file.write_bytes(raw)
    said = export(model, *PLAIN)
    assert said.code == 1
    assert "\x1b" not in said.err + said.out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("run", "{model}", "hello"), 1, r"model holds nothing that a runtime here can load"),
        (("run", "{nowhere}", "hello"), 1, r"nowhere is not a folder"),
        (("run", "{nowhere}", "hello", "--top-k", "5"), 2, r"--top-k, .* of --sample, which is not given"),
        (("inspect", "{nowhere}"), 1, r"nowhere: no such folder"),
        (("eval", "{nowhere}", "--model", "{model}"), 1, r"nowhere"),
        (("eval", "{model}", "--model", "{model}"), 1, r"genai_config|model\.onnx"),
        (("profile", "{nowhere}"), 1, r"nowhere: no such folder"),
        (("plan", "{nowhere}", "-t", "onnx-x64", "-b", "4bpw"), 1, r"nowhere: no such folder"),
        (("plan", "{model}", "-t", "onnx-x64"), 2, r"give --budget \(a size\) or --max-loss"),
        (("compress", "{nowhere}", "--plan", "dense:fp32", "-o", "{out}"), 1, r"nowhere: no such folder"),
        (("compress", "{model}", "--plan", "dense:fp32", "-o", "{model}"), 1, r"model: already exists"),
        (("bench",), 2, r"give artifact folders or --shape"),
        (("bench", "{nowhere}", "--rounds", "1"), 1, r"nowhere"),
        (("bench", "--shape", "llama-9t"), 2, r"unknown shape 'llama-9t'; known: .*llama-tiny"),
        (("bench", "{model}", "--baseline", "fp32"), 2, r"--baseline and --smaller need --model"),
        (("bench", "{model}", "--sts", "{nowhere}"), 2, r"--sts and --calibration measure quality, against --model"),
        (("bench", "{model}", "--smaller-as", "int8"), 2, r"--smaller-as .* none is given"),
        (("bench", "--shape", "llama-tiny", "--model", "{model}"), 2, r"for artifacts, not for --shape"),
        (("bench", "{model}", "--device", "abacus"), 2, r"unknown devices plugin 'abacus'"),
        (("bench", "{model}", "{model}"), 2, r"contestants with different names"),
        (("bench", "{model}", "--baseline", "int3", "--model", "{model}"), 2, r"unknown baseline 'int3'; known"),
        (("targets", "onnx-riscv"), 2, r"unknown target"),
        (("frobnicate",), 2, r"No such command 'frobnicate'.*; see `edgec --help`"),
    ],
)
def test_the_other_verbs_fail_in_one_line_too(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, words: tuple[str, ...], code: int, message: str
) -> None:
    before = tree(tmp_path)
    places = {"{model}": model, "{nowhere}": tmp_path / "nowhere", "{out}": tmp_path / "out"}
    check_failure(invoke(capsys, *(places.get(word, word) for word in words)), code, message)
    assert tree(tmp_path) == before
