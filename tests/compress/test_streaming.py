"""Compression block by block: what every layer is fitted on, what comes out, and what is left when it fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from decoder_cases import make_config, make_model
from models_for_tests import ruined, set_weight, tree
from safetensors.torch import load_file, save_file

import edgec
from edgec import modeling
from edgec.blocks.stored_weights import StoredWeights
from edgec.calibration import Batches, pad
from edgec.checkpoint import Checkpoint, open_checkpoint
from edgec.compress.apply import fit_choices
from edgec.compress.store import assemble, open_compressed, read_factors
from edgec.compress.streaming import compress_streamed, fit_by_rows, stream_fit, table_rows
from edgec.errors import EdgecError, NumericsError
from edgec.export.targets import get_target
from edgec.fit import Factors
from edgec.modeling import Layer
from edgec.moments import SecondMoment, TableMoment, smoothed
from edgec.plan.files import write_plan
from edgec.plan.planner import constrained_plan, make_choice
from edgec.profile.activations import collect
from edgec.quantize.formats import CoreFormat, QuantizedTensor
from edgec.records import Choice, Plan, Spec

HALF = "uniform:0.5:int4-b32"
BLOCK = "model.layers.0."
QKV = [f"{BLOCK}self_attn.{x}_proj" for x in "qkv"]
OUT, DOWN = f"{BLOCK}self_attn.o_proj", f"{BLOCK}mlp.down_proj"
WIDE = [f"{BLOCK}mlp.{x}_proj" for x in ("gate", "up")]
NEXT = "model.layers.1.self_attn.q_proj"


def some_batches(vocabulary: int = 300) -> Batches:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in (3, 9, 20, 40, 60, 60, 60, 60)]
    return Batches("made up", (pad(rows[:4]), pad(rows[4:])))


def planned(folder: Path, text: str = HALF) -> tuple[Checkpoint, list[Layer], Plan]:
    checkpoint = open_checkpoint(folder)
    layers = modeling.layers(modeling.skeleton(checkpoint))
    return checkpoint, layers, constrained_plan(text, layers, get_target("onnx-x64"), checkpoint.fingerprint)


def without_tables(folder: Path) -> list[Choice]:
    return [choice for choice in planned(folder)[2].choices if choice.role != "embedding"]


Moments = dict[str, SecondMoment | None]


def streamed(
    folder: Path,
    choices: Sequence[Choice] | None = None,
    *,
    text: str = HALF,
    sequential: bool = True,
    targets: dict[str, Any] | None = None,
) -> tuple[dict[str, Factors], Moments]:
    """All factors, and the moment that every layer was fitted with; in `targets`, what it was fitted to."""
    checkpoint, layers, plan = planned(folder, text)
    moments: Moments = {}

    def fit(choice: Choice, weight: Any, moment: SecondMoment | None) -> Factors:
        moments[choice.layer] = moment
        if targets is not None:
            targets[choice.layer] = np.array(weight)
        return fit_by_rows(choice, weight, moment)

    found: dict[str, Factors] = {}
    chosen = plan.choices if choices is None else choices
    for group in stream_fit(checkpoint, layers, chosen, some_batches(), fit_choice=fit, sequential=sequential):
        found |= group
    return found, moments


def whole_moments(folder: Path, factors: Mapping[str, Factors] | None = None) -> Mapping[str, Any]:
    """H of every layer, by the whole model with these factors in place of its weights."""
    model = modeling.load_dense(open_checkpoint(folder))
    for name, fitted in (factors or {}).items():
        weight = torch.from_numpy(fitted.dense())
        model.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)
    return collect(model, modeling.layers(model), some_batches(), pooling=None, curvature=False).second_moments


def difference(moment: SecondMoment | None, other: Any) -> float:
    assert moment is not None
    return float(np.abs(moment.matrix - other).max() / np.abs(other).max())


def test_the_first_layers_see_what_the_dense_model_gives(lm_source: Path) -> None:
    _, moments = streamed(lm_source, without_tables(lm_source))
    dense = whole_moments(lm_source)
    assert all(difference(moments[name], dense[name]) < 1e-5 for name in QKV)
    assert moments[QKV[0]] is moments[QKV[2]]


def test_later_blocks_see_what_the_compressed_ones_give(lm_source: Path) -> None:
    factors, moments = streamed(lm_source)
    dense = whole_moments(lm_source)
    before = whole_moments(lm_source, {n: f for n, f in factors.items() if BLOCK in n or n == "model.embed_tokens"})
    assert difference(moments[NEXT], before[NEXT]) < 1e-4
    assert difference(moments[NEXT], dense[NEXT]) > 0.01
    everything = whole_moments(lm_source, {n: f for n, f in factors.items() if n != "lm_head"})
    assert difference(moments["lm_head"], everything["lm_head"]) < 1e-4
    assert difference(moments["lm_head"], dense["lm_head"]) > 0.01


def test_inside_a_block_layers_see_the_compressed_ones_before_them(lm_source: Path) -> None:
    choices = without_tables(lm_source)
    factors, moments = streamed(lm_source, choices)
    dense = whole_moments(lm_source)
    done: dict[str, Factors] = {}
    for group, following in ((QKV, OUT), ([OUT], WIDE[0]), (WIDE, DOWN)):
        done |= {name: factors[name] for name in group}
        assert difference(moments[following], whole_moments(lm_source, done)[following]) < 1e-4
        assert difference(moments[following], dense[following]) > 0.01
    _, at_once = streamed(lm_source, choices, sequential=False)
    assert all(difference(at_once[name], dense[name]) < 1e-5 for name in (*QKV, OUT, *WIDE, DOWN))
    assert difference(at_once[NEXT], dense[NEXT]) > 0.01


def watched(folder: Path, factors: Mapping[str, Factors], *names: str) -> list[Any]:
    """The inputs [tokens, width] of these modules, in the whole model with the factors in place."""
    model = modeling.load_dense(open_checkpoint(folder))
    for name, fitted in factors.items():
        weight = torch.from_numpy(fitted.dense())
        model.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)
    seen: list[list[torch.Tensor]] = [[] for _ in names]
    for name, rows in zip(names, seen, strict=True):
        model.get_submodule(name).register_forward_pre_hook(lambda _m, x, rows=rows: rows.append(x[0]))
    masks = []
    with torch.no_grad():
        for batch in some_batches().items:
            model(**batch)
            masks.append(batch["attention_mask"].bool())
    return [torch.cat([x[mask] for x, mask in zip(rows, masks, strict=True)]).double().numpy() for rows in seen]


def test_layers_make_up_for_what_the_ones_before_them_lost(lm_source: Path) -> None:
    """They are fitted to what the dense model has at their outputs, the residual stream included."""
    choices, targets = without_tables(lm_source), dict[str, Any]()
    factors, moments = streamed(lm_source, choices, targets=targets)
    weights = modeling.load_dense(open_checkpoint(lm_source))
    order = [*QKV, OUT, *WIDE, DOWN, NEXT]
    cases = ((DOWN, f"{BLOCK}post_attention_layernorm"), (WIDE[0], None), (NEXT, None))
    for layer, addend in cases:
        before = {name: factors[name] for name in order[: order.index(layer)]}
        dense, residual = watched(lm_source, {}, layer, addend or layer)
        here, drifted = watched(lm_source, before, layer, addend or layer)
        weight = weights.get_parameter(f"{layer}.weight").double().numpy()
        missing = (dense - here) @ weight.T + (residual - drifted if addend else 0)
        change = targets[layer] - weight
        left = missing - here @ change.T
        assert np.linalg.norm(left) < 0.95 * np.linalg.norm(missing), layer
        moment = here.T @ here / len(here)
        gradient = left.T @ here / len(here) - 0.02 * np.trace(moment) / len(moment) * change
        assert np.abs(gradient).max() < 1e-3 * np.abs(missing.T @ here / len(here)).max(), layer
    assert all(targets[name].dtype == np.float32 for name in order)
    np.testing.assert_array_equal(targets[QKV[0]], weights.get_parameter(f"{QKV[0]}.weight").numpy())
    assert moments[QKV[0]] is moments[QKV[2]]


def test_a_table_does_not_get_what_its_head_makes_up_for(lm_source: Path) -> None:
    targets: dict[str, Any] = {}
    streamed(lm_source, text="dense:int8-b32", targets=targets)
    weights = modeling.load_dense(open_checkpoint(lm_source))
    np.testing.assert_array_equal(targets["lm_head"], weights.get_parameter("model.embed_tokens.weight").numpy())
    assert not np.array_equal(targets[NEXT], weights.get_parameter(f"{NEXT}.weight").numpy())
    alone = [c for c in planned(lm_source, "dense:int4-b32")[2].choices if c.role != "embedding"]
    streamed(lm_source, alone, targets=targets)
    assert not np.array_equal(targets["lm_head"], weights.get_parameter("model.embed_tokens.weight").numpy())


def gemma(folder: Path) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 300}
    make_model(make_config("gemma3", **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("text", [HALF, "dense:int4-b32", "dense:fp32"])
@pytest.mark.parametrize("kind", ["llama", "gemma", "bert"])
def test_the_folder_is_the_factors(kind: str, text: str, lm_source: Path, encoder_source: Path, tmp_path: Path) -> None:
    """It loads, and computes what the factors in memory do; where nothing is lost, what the dense model does."""
    source = {"llama": lm_source, "bert": encoder_source}.get(kind) or gemma(tmp_path / "gemma")
    checkpoint, layers, plan = planned(source, text)
    told: list[tuple[int, int]] = []
    compress_streamed(
        checkpoint,
        layers,
        plan,
        some_batches(),
        tmp_path / "out",
        plan_text=write_plan(plan),
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (len(layers), len(layers))
    loaded = edgec.load(tmp_path / "out")
    factors, _ = streamed(source, text=text)
    batch = some_batches().items[0]
    with torch.no_grad():
        got, expected = loaded(**batch)[0], assemble(checkpoint, factors)(**batch)[0]
        dense = modeling.load_dense(checkpoint)(**batch)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    if text == "dense:fp32":
        torch.testing.assert_close(got, dense, rtol=1e-5, atol=1e-5)
    assert open_compressed(tmp_path / "out").plan == plan
    assert {p.name for p in tmp_path.iterdir()} <= {"out", "gemma"}


def test_a_tied_head_and_its_table_share_what_they_store(lm_source: Path, tmp_path: Path) -> None:
    checkpoint, layers, plan = planned(lm_source, "dense:int8-b32")
    compress_streamed(checkpoint, layers, plan, some_batches(), tmp_path / "out", plan_text=write_plan(plan))
    compressed = open_compressed(tmp_path / "out")
    factors = read_factors(compressed)
    assert factors["lm_head"].cores["weight"] is factors["model.embed_tokens"].cores["weight"]
    assert not any(name.startswith("model.embed_tokens") for name in compressed.checkpoint.tensors)


def test_without_text_every_layer_is_fitted_plainly(lm_source: Path, tmp_path: Path) -> None:
    for text in (HALF, "dense:int8-b32"):
        checkpoint, layers, plan = planned(lm_source, text)
        out = tmp_path / text.replace(":", "-")
        compress_streamed(checkpoint, layers, plan, None, out, plan_text=write_plan(plan))
        model = modeling.load_dense(checkpoint)
        weights = {layer.name: model.get_parameter(f"{layer.name}.weight").numpy() for layer in layers}
        expected = fit_choices(plan.choices, weights.__getitem__, layers, lambda name: None)
        found = read_factors(open_compressed(out))
        for name, fitted in expected.items():
            np.testing.assert_array_equal(found[name].dense(), fitted.dense())


def test_the_same_command_twice_gives_the_same_bytes(lm_source: Path, tmp_path: Path) -> None:
    checkpoint, layers, plan = planned(lm_source)
    for name in ("one", "two"):
        compress_streamed(checkpoint, layers, plan, some_batches(), tmp_path / name, plan_text=write_plan(plan))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def error_of(folder: Path, out: Path) -> str:
    checkpoint, layers, plan = planned(folder)
    with pytest.raises(EdgecError) as caught:
        compress_streamed(checkpoint, layers, plan, some_batches(), out, plan_text=write_plan(plan))
    assert isinstance(caught.value, NumericsError)
    assert [p.name for p in out.parent.iterdir()] == [folder.name]  # nothing of the output, and no scratch
    return str(caught.value)


@pytest.mark.parametrize("layer", ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj"])
def test_a_weight_that_is_not_finite_is_named(layer: str, lm_source: Path, tmp_path: Path) -> None:
    folder = ruined(lm_source, tmp_path / "model")
    set_weight(folder, f"{layer.removeprefix('model.')}.weight", float("nan"))
    assert f"{layer}.weight" in error_of(folder, tmp_path / "out")


def test_activations_that_overflow_are_named(lm_source: Path, tmp_path: Path) -> None:
    folder = ruined(lm_source, tmp_path / "model")
    set_weight(folder, "layers.1.post_attention_layernorm.weight", 1e30)  # its square is no float32
    message = error_of(folder, tmp_path / "out")
    assert "layer 'model.layers.1.mlp.gate_proj': its activations are not finite" in message


def test_a_singular_second_moment_is_survived(lm_source: Path, tmp_path: Path) -> None:
    """A layer that sees nothing but zeros, and a channel that never fires."""
    folder = ruined(lm_source, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][:] = 0
    tensors["model.layers.1.input_layernorm.weight"][5] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    factors, moments = streamed(folder)
    zeros, dead = moments[QKV[0]], moments[NEXT]
    assert zeros is not None and not zeros.matrix.any()
    assert dead is not None and not dead.matrix[5].any() and dead.matrix.any()
    assert all(np.isfinite(fitted.dense()).all() for fitted in factors.values())


@pytest.mark.parametrize("role", ["head", "embedding"])
@pytest.mark.parametrize("name", ["int4-b32", "int8-b32", "int4-b32-zp", "fp16"])
def test_large_matrices_are_fitted_row_by_row(role: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((70, 64)).astype(np.float16)
    x = rng.standard_normal((500, 64)) @ rng.standard_normal((64, 64))
    moment = SecondMoment(x.T @ x / 500) if role == "head" else None
    choice = Choice("layer", role, (70, 64), Spec("dense"), name, 0, 0)
    whole = fit_by_rows(choice, weight, moment)
    monkeypatch.setattr("edgec.compress.streaming._ROWS_VALUES", 64 * 9)
    parts = fit_by_rows(choice, weight, moment)
    assert parts.contraction == whole.contraction
    assert parts.stored_bytes == whole.stored_bytes
    a, b = whole.cores["weight"], parts.cores["weight"]
    if not isinstance(a, QuantizedTensor):
        np.testing.assert_array_equal(a, b)
        return
    assert isinstance(b, QuantizedTensor) and a.scales.dtype == b.scales.dtype and a.shape == b.shape
    # GPTQ sums its products in another order where there are fewer rows: a number on the border may round elsewhere.
    assert np.linalg.norm(whole.dense() - parts.dense()) < 0.02 * np.linalg.norm(whole.dense() - weight)


def test_rows_of_a_factored_table_count_by_how_often_they_are_read(encoder_source: Path) -> None:
    _, layers, plan = planned(encoder_source, "dense:int4-b32")
    (table,) = (layer for layer in layers if layer.name == "embeddings.word_embeddings")
    narrow = make_choice(table, Spec("table_svd", (table.shape[1] // 4,)), CoreFormat.parse("fp16"))
    factors, moments = streamed(encoder_source, [narrow if c.layer == table.name else c for c in plan.choices])
    counts = np.zeros(table.shape[0])
    for batch in some_batches().items:
        counts += np.bincount(batch["input_ids"][batch["attention_mask"].bool()], minlength=len(counts))
    moment = moments.pop(table.name)
    assert isinstance(moment, TableMoment)
    assert all(moments[c.layer] is None for c in plan.choices if c.role == "embedding" and c.layer != table.name)
    np.testing.assert_allclose(moment.rows, smoothed(counts / counts.sum()), rtol=1e-5)
    weight = StoredWeights(checkpoint := open_checkpoint(encoder_source), modeling.skeleton(checkpoint))(table.name)
    plain = fit_by_rows(narrow, weight, None)
    seen, even = (counts @ ((weight - f.dense()) ** 2).sum(1) for f in (factors[table.name], plain))
    assert seen < 0.99 * even


def test_rows_of_a_table() -> None:
    ids = np.array([0, 7, 19])
    for name in ("int8-b32", "int4-b32-zp", "fp16", "fp32"):
        weight = np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32)
        fitted = fit_by_rows(Choice("table", "embedding", (20, 32), Spec("dense"), name, 0, 0), weight, None)
        np.testing.assert_array_equal(table_rows(fitted, ids), fitted.dense()[ids])


def test_a_linear_layer_before_the_blocks(tmp_path: Path) -> None:
    """Electra projects its embeddings: that layer sees the compressed tables, the first block what it makes of them."""
    config = transformers.ElectraConfig(
        vocab_size=300,
        embedding_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.ElectraModel(config).save_pretrained(tmp_path / "model")
    factors, moments = streamed(tmp_path / "model", text="dense:int4-b32")
    model = modeling.load_dense(open_checkpoint(tmp_path / "model"))
    seen: dict[str, list[torch.Tensor]] = {}
    watched = ("embeddings_project", "encoder.layer.0.attention.self.query")
    for name in watched:
        seen[name] = []
        model.get_submodule(name).register_forward_pre_hook(lambda _m, x, rows=seen[name]: rows.append(x[0]))
    for name in ("embeddings_project", *(n for n in factors if n.startswith("embeddings."))):
        weight = torch.from_numpy(factors[name].dense())
        model.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)
    batches = some_batches()
    with torch.no_grad():
        for batch in batches.items:
            model(**batch)
    for name in watched:
        x = torch.cat([r[b["attention_mask"].bool()] for r, b in zip(seen[name], batches.items, strict=True)])
        assert difference(moments[name], (x.T @ x / len(x)).numpy()) < 1e-4
