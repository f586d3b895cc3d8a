"""The YAML that people edit: it comes back as it was written, and nothing in it is guessed at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgec import limits
from edgec.errors import RecipeError
from edgec.export.targets import get_target
from edgec.modeling import Layer
from edgec.plan.files import read_plan, read_yaml, write_plan
from edgec.plan.planner import constrained_plan, make_choice
from edgec.quantize.formats import CoreFormat
from edgec.records import Plan, Spec

X64 = get_target("onnx-x64")
LAYERS = [
    Layer("embed", "embedding", (512, 128)),
    Layer("block.0.up", "linear", (256, 128)),
    Layer("block.0.down", "linear", (128, 256)),
    Layer("head", "head", (512, 128), tied_to="embed"),
]


def sample() -> Plan:
    plan = constrained_plan("dense:int4-b32", LAYERS, X64, "sha256:abc", 1234)
    train = make_choice(
        LAYERS[2], Spec("tensor_train", (32, 32), ((128, 1), (1, 8), (1, 32))), CoreFormat.parse("int8-b32")
    )
    scored = replace(train, error=0.125, loss=0.0625)
    low_rank = replace(make_choice(LAYERS[1], Spec("svd", (64,)), CoreFormat.parse("int4-b64")), error=0.5)
    by_layer = {**plan.by_layer(), scored.layer: scored, low_rank.layer: low_rank}
    return replace(plan, choices=tuple(by_layer.values()), notes=("yes: no", "# not a comment", "ünïcode"))


def written(folder: Path, text: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder: Path, text: str, match: str) -> None:
    with pytest.raises(RecipeError, match=match) as caught:
        read_plan(written(folder, text), LAYERS)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_plans_round_trip(tmp_path: Path) -> None:
    plan = sample()
    text = write_plan(plan)
    assert text.startswith("# edgec plan.")
    assert write_plan(plan) == text
    assert read_plan(written(tmp_path, text), LAYERS) == plan


def test_a_file_that_never_ends_is_not_read_to_its_end() -> None:
    with pytest.raises(RecipeError, match=r"more than the 1000000 bytes that are read"):
        read_yaml(Path("/dev/zero"))


def test_the_order_of_layers_is_kept(tmp_path: Path) -> None:
    lines = [line.strip() for line in write_plan(sample()).splitlines()]
    positions = [next(i for i, line in enumerate(lines) if line.startswith(f"{layer.name}:")) for layer in LAYERS]
    assert positions == sorted(positions)


def test_an_edited_choice_is_sized_again_and_forgets_its_scores(tmp_path: Path) -> None:
    text = write_plan(sample())
    assert "ranks: [64]" in text
    plan = read_plan(written(tmp_path, text.replace("ranks: [64]", "ranks: [32]")), LAYERS)
    choice = plan.by_layer()["block.0.up"]
    assert choice == make_choice(LAYERS[1], Spec("svd", (32,)), CoreFormat.parse("int4-b64"))
    assert choice.error is None
    assert plan.by_layer()["block.0.down"] == sample().by_layer()["block.0.down"]


def test_a_head_in_its_tables_format_shares_its_bytes(tmp_path: Path) -> None:
    text = write_plan(sample())
    plan = read_plan(written(tmp_path, text), LAYERS)
    assert plan.by_layer()["head"].bytes == 0
    other = text.replace("head:\n    kind: dense\n    format: int4-b32", "head:\n    kind: dense\n    format: int8-b32")
    if other == text:
        other = text.replace("head: {kind: dense, format: int4-b32", "head: {kind: dense, format: int8-b32")
    assert other != text
    assert read_plan(written(tmp_path, other), LAYERS).by_layer()["head"].bytes > 0


HEAD = "version: 1\nfingerprint: f\ntarget: onnx-x64\nbudget: x\n"
UP = "layers:\n  block.0.up: "


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not an edgec plan"),
        ("[]", "not an edgec plan"),
        ("layers: []", "not an edgec plan"),
        ("version: 2\nlayers: {}", "plan version 2, this edgec reads 1"),
        ("layers: {}", "plan version None"),
        ('version: "1"\nlayers: {}', "plan version '1'"),
        ("version: 1\nlayers: {}", "not an edgec plan"),
        (HEAD + "layers: {}\nextra: 1", "unknown key 'extra'"),
        (HEAD + UP + "{kind: dense, format: int4-b32, rank: [3]}", "'block.0.up': unknown key 'rank'"),
        (HEAD + UP + "{kind: parafac, format: int4-b32}", "unknown kind 'parafac'; known: .*dense, .*svd, "),
        (HEAD + UP + "{kind: ../evil, format: int4-b32}", "unknown kind"),
        (HEAD + UP + "{kind: [svd], format: int4-b32}", "unknown kind"),
        (HEAD + UP + "{kind: dense}", "not an edgec plan"),
        (HEAD + UP + "{kind: dense, format: int9}", "'block.0.up': unknown core format 'int9'"),
        (HEAD + UP + "{kind: dense, format: no}", "unknown core format 'no'"),
        (HEAD + UP + "dense", "'block.0.up': expected a mapping"),
        (HEAD + UP + "{kind: svd, ranks: [129], format: int4-b32}", "'block.0.up': rank 129 .* the cut's maximum"),
        (HEAD + UP + "{kind: svd, ranks: [0], format: int4-b32}", "ranks are positive integers"),
        (HEAD + UP + "{kind: svd, ranks: [yes], format: int4-b32}", "ranks are positive integers"),
        (HEAD + UP + "{kind: svd, ranks: [true], format: int4-b32}", "ranks are positive integers"),
        (HEAD + UP + "{kind: svd, ranks: [3.0], format: int4-b32}", "ranks are positive integers"),
        (HEAD + UP + "{kind: svd, ranks: '32', format: int4-b32}", "ranks are positive integers"),
        (HEAD + UP + "{kind: svd, ranks: 32, format: int4-b32}", "not an edgec plan"),
        (HEAD + UP + "{kind: tensor_train, ranks: [4], modes: [[256], [128]], format: fp16}", "modes are"),
        (HEAD + UP + "{kind: tensor_train, ranks: [4], modes: [[2, 2], [2, 2]], format: fp16}", "multiply to 4x4"),
        (HEAD + "layers: {nowhere: {kind: dense, format: fp16}}", "layer 'nowhere' is not in the model"),
        (HEAD + "layers: {1: {kind: dense, format: fp16}}", "layer 1 is not in the model"),
        (HEAD + "totals: 3\nlayers: {}", "not an edgec plan"),
        (HEAD + "totals: {other_bytes: .inf}\nlayers: {}", "other_bytes is a number of bytes, got inf"),
        (HEAD + "totals: {other_bytes: -9}\nlayers: {}", "other_bytes is a number of bytes, got -9"),
        (HEAD + UP + "{kind: dense, format: int4-b32, bytes: 0, error: .nan}", "error and loss are finite"),
        (HEAD + "totals: {other_bytes: 1" + "0" * 400 + "}\nlayers: {}", "a number of 401 digits"),
        (HEAD + "totals: {other_bytes: 0x" + "F" * 4000 + "}\nlayers: {}", "a number of 4002 digits"),
    ],
    ids=range(33),
)
def test_plans_that_are_not_understood(text: str, match: str, tmp_path: Path) -> None:
    refused(tmp_path, text, match)


def test_numbers_and_words_are_what_they_look_like(tmp_path: Path) -> None:
    """YAML 1.1 would read `no` as false, `010` as eight and `1:30` as ninety."""
    text = "a: no\nb: 010\nc: yes\nd: 1:30\ne: 0o17\nf: on\ng: ~\nh: true\ni: 2026-01-01x\n"
    found = read_yaml(written(tmp_path, text))
    assert found == {
        "a": "no",
        "b": 10,
        "c": "yes",
        "d": "1:30",
        "e": 15,
        "f": "on",
        "g": None,
        "h": True,
        "i": "2026-01-01x",
    }
    assert type(found["b"]) is int


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: 1\na: 2", "not valid YAML|duplicate"),
        ("%YAML 1.1\n---\na: no", "YAML 1.2 only"),
        ("a: !!python/object/apply:os.system [x]", "tags are not allowed"),
        ("a: !custom 1", "tags are not allowed"),
        ("a: &x [1]\nb: *x", "aliases, merges and tags"),
        ("<<: {a: 1}", "aliases, merges and tags"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: [", "plan.yaml:.* not valid YAML"),
        ("a: '", "not valid YAML"),
        ("\t- a", "not valid YAML"),
        ("a: \x07", "not valid YAML"),
        ("[" * 100_000, "nested deeper|not valid YAML"),
        ("a: " + "{a: " * 100, "nested deeper|not valid YAML"),
        ("a: 9999-12-31T23:59:59.9999999", "not valid YAML"),
    ],
    ids=range(14),
)
def test_yaml_that_is_hostile_or_broken(text: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=match) as caught:
        read_yaml(written(tmp_path, text))
    assert "plan.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_yaml(tmp_path / "nowhere.yaml")
    (tmp_path / "x.yaml").write_bytes(b"a: \xff")
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_yaml(tmp_path / "x.yaml")
    (tmp_path / "big.yaml").write_bytes(b" " * (limits.MAX_YAML_BYTES + 1))
    with pytest.raises(RecipeError, match="more than"):
        read_yaml(tmp_path / "big.yaml")
