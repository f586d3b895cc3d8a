"""Attention with its three products as one operator: the same numbers, and only where a mask is all it adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from graphs_for_tests import constant, model_of, session, value

from edgec.export.onnx import lowering
from edgec.export.onnx.attention import _is_padding, join_attentions
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


def lowered(name: str, *, join: bool, plan: Mapping[str, tuple[Spec, str]] | None = None) -> ir.Model:
    """plan: a decomposition and a format for the layers whose names end so; others are dense in int8."""
    stored, weights = exported(name)
    model = ir.from_proto(onnx.ModelProto.FromString(stored))
    nodes = {node.name: node for node in model.graph}
    factors = {}
    for layer, weight in weights.items():
        own = next((chosen for end, chosen in (plan or {}).items() if layer.endswith(end)), (Spec("dense"), "int8-b32"))
        factors[layer] = fit(weight, own[0], CoreFormat.parse(own[1]))
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


@pytest.mark.parametrize("masked", MASKS)
def test_the_numbers_are_the_same(masked: str, tmp_path: Path) -> None:
    apart, joined = lowered("bert", join=False), lowered("bert", join=True)
    assert (kinds(apart)["MultiHeadAttention"], kinds(joined)["QAttention"]) == (2, 2)
    assert "MultiHeadAttention" not in kinds(joined)
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
    assert join_attentions(model) == 0
    mask = np.array(MASKS["the end"])
    np.testing.assert_array_equal(hidden(model, mask, tmp_path / "model"), hidden(apart, mask, tmp_path / "apart"))


def scores_bias(kind: str) -> tuple[ir.Model, ir.Value]:
    """A graph that adds something to scores, which depends on its mask and perhaps on more."""
    dims = ["B", "T"]
    mask, ids = value("attention_mask", ir.DataType.INT64, dims), value("input_ids", ir.DataType.INT64, dims)
    hides = -1.0 if kind == "too little" else -1e9
    held = [
        constant("one", np.array(1.0, np.float32)),
        constant("hides", np.array(hides, np.float32)),
        constant("axes", np.array([1, 2])),
    ]
    there = ir.node("Cast", [mask], attributes={"to": ir.DataType.FLOAT})
    absent = ir.node("Sub", [held[0], there.outputs[0]])
    hidden = ir.node("Mul", [absent.outputs[0], held[1]])
    nodes = [there, absent, hidden]
    if kind == "tokens":
        words = ir.node("Cast", [ids], attributes={"to": ir.DataType.FLOAT})
        nodes += [words, ir.node("Add", [hidden.outputs[0], words.outputs[0]])]
    nodes.append(ir.node("Unsqueeze", [nodes[-1].outputs[0], held[2]]))
    for number, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].dtype = f"v{number}", ir.DataType.FLOAT
    added = nodes[-1].outputs[0]
    model = model_of([mask], nodes, added, held)
    if kind == "tokens":
        model.graph.inputs.append(ids)
    if kind == "another mask":
        mask.name = "mask"
    return model, added


@pytest.mark.parametrize(
    ("kind", "padding"), [("mask", True), ("too little", False), ("tokens", False), ("another mask", False)]
)
def test_what_is_added_to_scores_is_asked(kind: str, padding: bool) -> None:
    model, added = scores_bias(kind)
    assert _is_padding(model, added) is padding
