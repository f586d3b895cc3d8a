"""Biases inside int8 products: the same numbers in fewer passes, and left where they do not belong to one product."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from graphs_for_tests import LAYER, constant, linear_graph, model_of, run_graph, session, value

from edgec.export.onnx import lowering
from edgec.export.onnx.biases import absorb_biases
from edgec.export.onnx.encoder import export_encoder
from edgec.export.onnx.graph import DenseGraph
from edgec.export.onnx.int8_products import BIAS, use_float_activations
from edgec.export.onnx.lowering import lower
from edgec.fit import Factors, fit
from edgec.quantize.formats import CoreFormat
from edgec.records import Spec

Array = np.ndarray[Any, Any]
WIDTH = 128
X = np.random.default_rng(0).standard_normal((2, 9, WIDTH)).astype(np.float32)
ADDED = np.random.default_rng(1).standard_normal(WIDTH).astype(np.float32)


def fitted(seed: int = 2) -> Factors:
    weight = np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)).astype(np.float32) / np.float32(WIDTH**0.5)
    return fit(weight, Spec("dense"), CoreFormat.parse("int8-b32"))


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def agrees(model: ir.Model, expected: Array, work: Path) -> None:
    found = run_graph(model, work, X)
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
    use_float_activations(model)
    np.testing.assert_allclose(run_graph(model, work, X), expected, atol=1e-5)


def residual_graph(kind: str) -> DenseGraph:
    """y = x Wᵀ + x + bias, in one node of three summands or in two."""
    x = value("x", ir.DataType.FLOAT, ["B", "T", WIDTH])
    weight, bias = constant("weight", np.zeros((WIDTH, WIDTH), np.float32)), constant("bias", ADDED)
    node = ir.node("MatMul", [x, weight], name="linear")
    product = node.outputs[0]
    product.name, product.shape, product.dtype = "product", ir.Shape(["B", "T", WIDTH]), ir.DataType.FLOAT
    nodes = [node]
    if kind == "Sum":
        nodes.append(ir.node("Sum", [product, x, bias]))
    else:
        nodes.append(ir.node("Add", [product, bias]))
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], x]))
    y = nodes[-1].outputs[0]
    y.name, y.shape, y.dtype = "y", ir.Shape(["B", "T", WIDTH]), ir.DataType.FLOAT
    return DenseGraph(model_of([x], nodes, y, [weight, bias]), {LAYER: node}, {})


def test_a_linear_with_a_bias_is_one_node_for_onnxruntime(tmp_path: Path) -> None:
    factors = fitted()
    graph = linear_graph(np.zeros((WIDTH, WIDTH), np.float32), ADDED)
    lower(graph, {LAYER: factors}, accuracy_level=4, int8=True)
    assert "Add" not in kinds(graph.model) and [v.name for v in graph.model.graph.outputs] == ["y"]
    session(graph.model, tmp_path, tmp_path / "optimized.onnx")
    optimized = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert [node.op_type for node in optimized] == ["DynamicQuantizeMatMul"] and len(optimized[0].input) == 5
    agrees(graph.model, X @ factors.dense().T + ADDED, tmp_path)


@pytest.mark.parametrize("kind", ["Sum", "Add"])
def test_beside_a_residual(kind: str, tmp_path: Path) -> None:
    factors, graph = fitted(), residual_graph(kind)
    lower(graph, {LAYER: factors}, accuracy_level=4, int8=True)
    assert kinds(graph.model).count(kind) == 1
    assert all(len(node.inputs) == 2 for node in graph.model.graph if node.op_type == kind)
    agrees(graph.model, X @ factors.dense().T + X + ADDED, tmp_path)


def test_a_product_that_something_else_reads_stays_as_it_is(tmp_path: Path) -> None:
    factors, graph = fitted(), linear_graph(np.zeros((WIDTH, WIDTH), np.float32), ADDED)
    graph.model.graph.outputs.append(graph.linears[LAYER].outputs[0])
    lower(graph, {LAYER: factors}, accuracy_level=4, int8=True)
    assert "Add" in kinds(graph.model)
    agrees(graph.model, X @ factors.dense().T + ADDED, tmp_path)


SIZES: dict[str, Any] = dict(
    vocab_size=99, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * WIDTH,
    max_position_embeddings=70,
)  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**SIZES, pad_token_id=1)),
}


@pytest.mark.parametrize("spread", [0.1, 0.0])
@pytest.mark.parametrize("name", MODELS)
def test_attention_adds_none_where_its_three_products_do(
    name: str, spread: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers as where every bias stays where torch has it, and none is left there; also where all layers
    share one constant, as equal ones do.
    """
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in (p for key, p in model.named_parameters() if key.endswith("bias")):
            parameter.normal_(std=spread)

    def exported(absorb: Callable[[ir.Graph], int]) -> ir.Model:
        monkeypatch.setattr(lowering, "absorb_biases", absorb)
        monkeypatch.setattr(lowering, "join_attentions", lambda model: 0)
        graph = export_encoder(model, "feature-extraction", pooling=None)
        state = model.state_dict()
        formats = CoreFormat.parse("int8-b32")
        factors = {n: fit(state[f"{n}.weight"].numpy(), Spec("dense"), formats) for n in graph.linears}
        lowering.lower(graph, factors, accuracy_level=4, int8=True)
        return graph.model

    def hidden(found: ir.Model, work: Path) -> Array:
        use_float_activations(found)
        ids = np.arange(5, 29).reshape(2, 12)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        run = session(found, work)
        result: Array = run.run(["last_hidden_state"], {i.name: feeds[i.name] for i in run.get_inputs()})[0]
        return result

    apart, inside = exported(lambda graph: 0), exported(absorb_biases)
    attentions = [node for node in inside.graph if node.op_type == "MultiHeadAttention"]
    assert len(attentions) == 2 and all(node.inputs[3] is None for node in attentions)
    assert sum(node.op_type == "MatMulIntegerToFloat" and len(node.inputs) > BIAS for node in inside.graph) >= 10
    assert absorb_biases(inside.graph) == 0
    np.testing.assert_allclose(hidden(inside, tmp_path / "in"), hidden(apart, tmp_path / "apart"), atol=2e-5)
