"""A model run block by block is the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from decoder_cases import FAMILIES, VOCABULARY, make_config, make_model
from models_for_tests import ruined, set_weight

from edgec import modeling
from edgec.blocks.hidden_states import HiddenStates
from edgec.blocks.walker import BlockWalker
from edgec.calibration import Batches, pad
from edgec.checkpoint import open_checkpoint
from edgec.errors import NumericsError, UnsupportedModelError
from edgec.pooling import Pooling
from edgec.profile.activations import collect

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "distilbert": ("DistilBert", {"dim": 64, "hidden_dim": 96, "n_layers": 3, "n_heads": 4}),
    "mpnet": ("MPNet", {}),  # its blocks give tuples
    "modernbert": ("ModernBert", {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 1}),
    "electra": ("Electra", {"embedding_size": 32}),  # a linear layer before the first block
}
_SPECIALS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}


def tiny_encoder(name: str) -> Any:
    family, changes = ENCODERS[name]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes | (_SPECIALS if name == "modernbert" else {}) | changes)
    model = getattr(transformers, f"{family}Model")(config).eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = noise * 0.15 if parameter.ndim > 1 else parameter.data + 0.3 * noise
    return model


def some_batches(seed: int = 0) -> Batches:
    """Rows of very different lengths, so that padding shows where it is not masked."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (2, 3, 3, 5, 9, 20, 31)]
    return Batches("made up", (pad(rows[:4]), pad(rows[4:])))


def saved(name: str, folder: Path) -> Path:
    model = tiny_encoder(name) if name in ENCODERS else make_model(make_config(name))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [*FAMILIES, *ENCODERS])
def test_hidden_states_and_moments_are_the_whole_models(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(name, tmp_path / "model"))
    model, batches = modeling.load_dense(checkpoint), some_batches()
    layers = modeling.layers(model)
    pooling = Pooling("mean", normalize=True) if name in ENCODERS else None
    expected = collect(model, layers, batches, pooling=pooling, curvature=False).second_moments
    walker = BlockWalker(checkpoint, [layer.name for layer in layers], batches, tmp_path)
    seen: list[torch.Tensor] = []
    for block in model.get_submodule(walker.path):
        block.register_forward_hook(lambda _m, _i, o: seen.append(o[0] if isinstance(o, tuple) else o))
    with torch.no_grad():
        for batch in batches.items:
            model(**batch)

    linears = {layer.name for layer in layers if layer.role != "embedding"}
    found = walker.see_outside([n for n in linears if not n.startswith(walker.path)], after=False)
    walker.embed()
    for index in range(len(walker)):
        names = [layer.name for layer in layers if layer.name.startswith(f"{walker.name(index)}.")]
        with walker.load(index) as block:
            for group in walker.groups(index, block, names):
                found |= dict.fromkeys(group, walker.see(index, block, group[:1])[group[0]])
            walker.advance(index, block)
        for batch in range(2):
            torch.testing.assert_close(walker.hidden.get(batch), seen[batch * len(walker) + index])
    found |= walker.see_outside([n for n in linears if n not in found], after=True)
    assert set(found) == linears
    for layer, (moment, drift) in ((name, (seen.moment, seen.drift)) for name, seen in found.items()):
        assert drift is None
        np.testing.assert_allclose(moment.matrix, expected[layer], rtol=1e-5, atol=1e-5 * np.abs(expected[layer]).max())


def test_layers_that_read_one_tensor_are_one_group(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved("llama", tmp_path / "model"))
    layers = [layer.name for layer in modeling.layers(modeling.skeleton(checkpoint))]
    walker = BlockWalker(checkpoint, layers, some_batches(), tmp_path)
    walker.embed()
    first = "model.layers.0."
    with walker.load(0) as block:
        groups = walker.groups(0, block, [n for n in layers if n.startswith(first)])
    short = [[name.rpartition(".")[2] for name in group] for group in groups]
    assert short == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize("name", [*FAMILIES, *ENCODERS])
def test_layers_that_write_to_the_residual_stream_are_found(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(name, tmp_path / "model"))
    layers = [layer.name for layer in modeling.layers(modeling.skeleton(checkpoint))]
    walker = BlockWalker(checkpoint, layers, some_batches(), tmp_path)
    walker.embed()
    with walker.load(1) as block:
        found = walker.addends(1, block, [n for n in layers if n.startswith(f"{walker.name(1)}.")])
    if name in ("gemma2", "gemma3"):  # they normalise before they add
        assert found == {}
        return
    assert sorted(found.values()) == ["", {"bert": "intermediate", "electra": "intermediate", "mpnet": "intermediate",
                                          "distilbert": "ffn", "modernbert": "mlp_norm"}.get(
                                              name, "post_attention_layernorm")]  # fmt: skip


def test_drift_is_how_far_the_dense_model_is(tmp_path: Path) -> None:
    """A block is changed: in the next one, inputs and the residual stream differ by what two whole models differ by."""
    checkpoint = open_checkpoint(saved("llama", tmp_path / "model"))
    model, batches = modeling.load_dense(checkpoint), some_batches()
    changed = modeling.load_dense(checkpoint)
    layer, place = "model.layers.1.mlp.down_proj", "post_attention_layernorm"
    walker = BlockWalker(checkpoint, [x.name for x in modeling.layers(model)], batches, tmp_path)
    walker.embed_dense()
    walker.embed()
    for index in range(2):
        with walker.load(index) as block, walker.load(index) as dense:
            if index == 0:
                addends = walker.addends(0, block, ["model.layers.0.mlp.down_proj"])
                assert addends == {"model.layers.0.mlp.down_proj": place}
                still = walker.see(0, block, list(addends), dense, addends)[layer.replace("1", "0")].drift
                assert still is not None and still.sums is not None and not still.inputs.any() and not still.sums.any()
                block.mlp.up_proj.weight *= 1.5
                changed.model.layers[0].mlp.up_proj.weight.data *= 1.5
                walker.advance(0, block, dense)
                continue
            seen = walker.see(1, block, [layer], dense, walker.addends(1, block, [layer]))[layer]
    rows: dict[Any, list[torch.Tensor]] = {}
    for which, whole in (("dense", model), ("here", changed)):
        for name in (layer, f"model.layers.1.{place}"):
            rows[which, name] = []
            keep = rows[which, name].append
            whole.get_submodule(name).register_forward_pre_hook(lambda _m, x, keep=keep: keep(x[0]))
        with torch.no_grad():
            for batch in batches.items:
                whole(**batch)
    masks = [batch["attention_mask"].bool() for batch in batches.items]
    x, xd, r, rd = (
        torch.cat([part[mask] for part, mask in zip(rows[which, name], masks, strict=True)])
        for name in (layer, f"model.layers.1.{place}")
        for which in ("here", "dense")
    )
    assert seen.drift is not None and seen.drift.sums is not None
    for got, wanted in (
        (seen.moment.matrix, x.T @ x),
        (seen.drift.inputs, (xd - x).T @ x),
        (seen.drift.sums, (rd - r).T @ x),
    ):
        wanted = (wanted / len(x)).numpy()
        np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())


def test_the_skeleton_holds_no_weights(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved("gemma3", tmp_path / "model"))
    model = modeling.hollow(checkpoint)
    assert all(p.device.type == "meta" for p in model.parameters())
    reference = dict(modeling.load_dense(checkpoint).named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, reference[name])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # tied by default
    walker = BlockWalker(checkpoint, [x.name for x in modeling.layers(model)], some_batches(), tmp_path)
    walker.embed()
    with walker.load(1) as block:
        assert all(p.device.type == "cpu" for p in block.parameters())
        weights = list(block.parameters())
    assert not any(p.numel() for p in weights)  # gone with the block, whoever still refers to it
    held = {n for n, p in walker.model.named_parameters() if p.device.type != "meta"}
    assert held == {"model.norm.weight"}


def test_blocks_are_the_longest_outermost_list(lm_source: Path) -> None:
    model: Any = modeling.skeleton(open_checkpoint(lm_source))
    names = [layer.name for layer in modeling.layers(model)]
    assert modeling.block_list(model, names) == "model.layers"
    model.model.layers[0].experts = torch.nn.ModuleList([torch.nn.Linear(2, 2, device="meta") for _ in range(9)])
    names = [layer.name for layer in modeling.layers(model)]
    assert modeling.block_list(model, names) == "model.layers"
    assert modeling.block_list(model, ["lm_head"]) is None


def test_shared_blocks_are_refused(tmp_path: Path) -> None:
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    transformers.AlbertModel(config).save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    layers = [layer.name for layer in modeling.layers(modeling.skeleton(checkpoint))]
    walker = BlockWalker(checkpoint, layers, some_batches(), tmp_path)
    with pytest.raises(UnsupportedModelError, match="does not get what the block before it made; compress it whole"):
        walker.embed()
    with pytest.raises(UnsupportedModelError, match="no list of transformer blocks"):
        BlockWalker(checkpoint, [], some_batches(), tmp_path)


def test_weights_that_are_not_finite_are_named(lm_source: Path, tmp_path: Path) -> None:
    folder = ruined(lm_source, tmp_path / "model")
    name = set_weight(folder, "layers.1.input_layernorm.weight", float("nan"))
    checkpoint = open_checkpoint(folder)
    layers = [layer.name for layer in modeling.layers(modeling.skeleton(checkpoint))]
    walker = BlockWalker(checkpoint, layers, some_batches(), tmp_path)
    with pytest.raises(NumericsError, match=f"tensor '{name}' holds NaN"), walker.load(1):
        pass


@pytest.mark.parametrize("cap", [0, 50, 1 << 20])
def test_hidden_states_beyond_the_cap_go_to_files(cap: int, tmp_path: Path) -> None:
    states = HiddenStates(tmp_path, cap)
    made = [torch.randn(2, n, 3) for n in (1, 2, 3)]
    for number, hidden in enumerate(made):
        states.put(number, hidden)
    assert len(list(tmp_path.iterdir())) == {0: 3, 50: 2, 1 << 20: 0}[cap]
    states.put(1, made[1] + 1)
    for number, hidden in enumerate([made[0], made[1] + 1, made[2]]):
        torch.testing.assert_close(states.get(number), hidden, rtol=0, atol=0)
