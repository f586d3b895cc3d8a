"""Attention with its three products as one operator: the same numbers, and only where a mask is all it adds."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from graphs_for_tests import session

from edgec.export.onnx import lowering
from edgec.export.onnx.attention import _is_padding
from edgec.export.onnx.encoder import export_encoder
from edgec.export.onnx.graph import DenseGraph
from edgec.export.onnx.int8_products import use_float_activations
from edgec.fit import fit
from edgec.quantize.formats import CoreFormat
from edgec.records import Spec

Array = np.ndarray[Any, Any]
SIZES: dict[str, Any] = dict(
    vocab_size=99, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
    max_position_embeddings=70,
)  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(
            vocab_size=99, dim=128, n_layers=2, n_heads=4, hidden_dim=256, max_position_embeddings=70
        )
    ),
    "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**SIZES, pad_token_id=1)),
}
MASKS = {
    "nothing": [[1] * 12, [1] * 12],
    "the end": [[1] * 12, [1] * 7 + [0] * 5],
    "the beginning": [[0] * 4 + [1] * 8, [1] * 12],
    "tokens between": [[1, 0] * 6, [1] * 12],
}


@cache
def exported(name: str) -> tuple[bytes, Mapping[str, Array]]:
    """The dense graph as a file has it, and the weights of its linears by module name."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in (p for key, p in model.named_parameters() if key.endswith("bias")):
            parameter.normal_(std=0.1)
    graph, state = export_encoder(model, "feature-extraction", pooling=None), model.state_dict()
    weights = {layer: state[f"{layer}.weight"].numpy() for layer in graph.linears}
    return ir.to_proto(graph.model).SerializeToString(), weights


def lowered(
    name: str, *, join: bool, plan: Mapping[str, tuple[Spec, str]] | None = None, strong: Sequence[int] = ()
) -> ir.Model:
    """plan: a decomposition and a format for the layers whose names end so; others are dense in int8. strong: channels
    of every layer's input that its products smooth.
    """
    stored, weights = exported(name)
    model = ir.from_proto(onnx.ModelProto.FromString(stored))
    nodes = {node.name: node for node in model.graph}
    factors = {}
    for layer, weight in weights.items():
        own = next((chosen for end, chosen in (plan or {}).items() if layer.endswith(end)), (Spec("dense"), "int8-b32"))
        rms = np.ones(weight.shape[1], np.float32)
        rms[list(strong)] = 16.0
        factors[layer] = replace(fit(weight, own[0], CoreFormat.parse(own[1])), input_rms=rms)
    graph = DenseGraph(model, {layer: nodes[f"{layer}/MatMul"] for layer in weights}, {})
    with pytest.MonkeyPatch.context() as patch:
        if not join:
            patch.setattr(lowering, "join_attentions", lambda model: 0)
        lowering.lower(graph, factors, accuracy_level=4, int8=True)
    return graph.model


def hidden(model: ir.Model, mask: Array, work: Path) -> Array:
    """Last hidden states [tokens that are there, d]."""
    ids = np.arange(5, 29).reshape(2, 12)
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    run = session(model, work)
    found: Array = run.run(["last_hidden_state"], {i.name: feeds[i.name] for i in run.get_inputs()})[0]
    return found[mask == 1]


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("strong", [(), (3, 40)])
@pytest.mark.parametrize("masked", MASKS)
def test_the_numbers_are_the_same(masked: str, strong: tuple[int, ...], tmp_path: Path) -> None:
    apart, joined = lowered("bert", join=False, strong=strong), lowered("bert", join=True, strong=strong)
    assert (kinds(apart)["MultiHeadAttention"], kinds(joined)["QAttention"]) == (2, 2)
    assert "MultiHeadAttention" not in kinds(joined) and ("Mul" in kinds(joined)) == bool(strong)
    mask = np.array(MASKS[masked])
    np.testing.assert_array_equal(hidden(joined, mask, tmp_path / "joined"), hidden(apart, mask, tmp_path / "apart"))
    for model in (apart, joined):
        use_float_activations(model)
    assert "QAttention" not in kinds(joined) and kinds(joined)["Attention"] == 2
    found, expected = hidden(joined, mask, tmp_path / "floats"), hidden(apart, mask, tmp_path / "wanted")
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "plan", "joined"),
    [
        ("distilbert", {}, 2),
        ("bert", {"key": (Spec("dense"), "int4-b32")}, 2),  # formats may differ: they are int8 when multiplied
        ("bert", {"0.attention.self.value": (Spec("svd", (64,)), "int8-b32")}, 1),  # its second core's input is its own
        ("mpnet", {}, 0),  # adds relative positions to its scores
    ],
)
def test_which_are_joined(name: str, plan: Mapping[str, tuple[Spec, str]], joined: int, tmp_path: Path) -> None:
    model, apart = lowered(name, join=True, plan=plan), lowered(name, join=False, plan=plan)
    assert kinds(model)["QAttention"] == joined and kinds(model)["MultiHeadAttention"] == 2 - joined
    mask = np.array(MASKS["the end"])
    np.testing.assert_array_equal(hidden(model, mask, tmp_path / "model"), hidden(apart, mask, tmp_path / "apart"))


class Scores(torch.nn.Module):
    """What a model might add to its scores [batch, 1 or heads, length, length]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        lowest = -1.0 if self.kind == "too little" else torch.finfo(torch.float32).min
        there = attention_mask[:, None, None, :].bool()
        places = torch.arange(input_ids.shape[1])
        apart = places[:, None] - places[None, :]
        if self.kind == "causal":
            there = there & (apart >= 0)
        elif self.kind == "window":
            there = there & (apart.abs() <= 512)
        added = torch.where(there, 0.0, lowest)
        if self.kind == "tokens":
            added = added + input_ids[:, None, None, :]
        elif self.kind == "distances":
            added = added - apart.abs()[None, None] * torch.tensor([0.5, 0.25])[None, :, None, None]
        elif self.kind == "one head":
            added = added * torch.tensor([1.0, 0.0])[None, :, None, None]
        elif self.kind == "no numbers":
            added = torch.where(there, 0.0, torch.nan)
        elif self.kind == "a short table":
            added = added + torch.zeros(1, 1, 64, 64)[:, :, : input_ids.shape[1], : input_ids.shape[1]]
        elif self.kind == "every row":
            added = added.expand(-1, -1, input_ids.shape[1], -1)
        return added


KINDS = {
    "keys": True, "every row": True, "too little": False, "causal": False, "window": False, "tokens": False,
    "distances": False, "one head": False, "no numbers": False, "a short table": False,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_to_scores_is_asked(kind: str) -> None:
    example = {"input_ids": torch.arange(14).reshape(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter about itself
        program = torch.onnx.export(
            Scores(kind), tuple(example.values()), dynamo=True, verbose=False, input_names=list(example),
            dynamic_shapes=[{0: "batch", 1: "length"} for _ in example],
        )  # fmt: skip
    assert program is not None
    model = program.model
    assert _is_padding(model, model.graph.outputs[0]) is KINDS[kind]
    next(value for value in model.graph.inputs if value.name == "attention_mask").name = "mask"
    assert not _is_padding(model, model.graph.outputs[0])
