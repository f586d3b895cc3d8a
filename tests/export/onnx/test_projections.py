"""Packed projections: the same numbers as apart, where the formats agree, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from models_for_tests import write_causal_lm

from edgec import modeling
from edgec.checkpoint import open_checkpoint
from edgec.export.onnx import projections
from edgec.export.onnx.decoder import build_decoder
from edgec.export.onnx.lowering import lower
from edgec.export.onnx.projections import pack_projections
from edgec.fit import Factors, fit
from edgec.quantize.formats import CoreFormat
from edgec.records import Spec

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj")


def lowered(source: Path, work: Path, formats: dict[str, str], ranks: Mapping[str, int] | None = None) -> ir.Model:
    """formats: of the projections of the first block; those of the others are int4-b32. Gate and up: if named.
    ranks: of layers in two cores.
    """
    graph = build_decoder(source, work)
    state = modeling.load_dense(open_checkpoint(source)).state_dict()
    factors: dict[str, Factors] = {}
    for name in graph.linears:
        kind = name.rpartition(".")[2]
        if kind in PROJECTIONS or kind in formats:
            fmt = CoreFormat.parse(formats.get(kind, "int4-b32") if ".0." in name else "int4-b32")
            spec = Spec("svd", (ranks[kind],)) if ranks else Spec("dense")
            factors[name] = fit(state[f"{name}.weight"].numpy(), spec, fmt)
    lower(graph, factors, accuracy_level=4)
    return graph.model


def logits(model: ir.Model, source: Path, path: Path) -> np.ndarray[Any, Any]:
    """Of a prompt, then of one token after it, on two threads: other kernels, in other shares."""
    import onnxruntime

    ir.save(model, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    head = modeling.dimensions(open_checkpoint(source)).head_dim
    asked = [wanted.name for wanted in session.get_inputs()]
    caches = [wanted for wanted in session.get_inputs() if wanted.name.startswith("past_key_values")]
    past = {wanted.name: np.zeros((1, wanted.shape[1], 0, head), np.float32) for wanted in caches}
    names = [output.name for output in session.get_outputs()]
    found, seen = [], 0
    for ids in (np.arange(3, 12)[None], np.array([[5]])):
        seen += ids.shape[1]
        feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones((1, seen), np.int64), **past}
        if "position_ids" in asked:
            feeds["position_ids"] = np.arange(seen - ids.shape[1], seen)[None]
        told = dict(zip(names, session.run(names, feeds), strict=True))
        found.append(told["logits"])
        past = {name: told[name.replace("past_key_values", "present")] for name in past}
    return np.concatenate(found, axis=1)


def products(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "MatMulNBits"]


@pytest.mark.parametrize("fmt", ["int4-b32", "int8-b32", "int4-b32-zp"])
def test_packed_they_give_the_same_logits_bit_for_bit(fmt: str, lm_source: Path, tmp_path: Path) -> None:
    model = lowered(lm_source, tmp_path, dict.fromkeys(PROJECTIONS, fmt))
    before, stored = len(products(model)), sum(v.const_value.nbytes for v in model.graph.initializers.values())  # type: ignore[union-attr]
    apart = logits(model, lm_source, tmp_path / "apart.onnx")
    attentions = sum(node.op_type == "GroupQueryAttention" for node in model.graph)
    assert pack_projections(model) == 2 * attentions > 0
    assert len(products(model)) == before - 2 * attentions
    assert sum(v.const_value.nbytes for v in model.graph.initializers.values()) == stored  # type: ignore[union-attr]
    np.testing.assert_array_equal(logits(model, lm_source, tmp_path / "packed.onnx"), apart)
    assert pack_projections(model) == 0


@pytest.mark.parametrize("other", ["int8-b32", "int4-b64", "int4-b32-zp"])
def test_other_formats_stay_apart(other: str, lm_source: Path, tmp_path: Path) -> None:
    model = lowered(lm_source, tmp_path, {"q_proj": "int4-b32", "k_proj": other, "v_proj": "int4-b32"})
    attentions = sum(node.op_type == "GroupQueryAttention" for node in model.graph)
    assert not any(node.op_type == "Split" for node in model.graph)
    left_out = pack_projections(model)
    assert left_out == 2 * (attentions - 1) + 1, "query and value are one product still"
    assert [len(node.outputs) for node in model.graph if node.op_type == "Split"] == [2]


def test_gate_and_up_are_one_product_and_a_split(lm_source: Path, tmp_path: Path) -> None:
    model = lowered(lm_source, tmp_path, dict.fromkeys([*PROJECTIONS, *MLP], "int4-b32"))
    before = len(products(model))
    apart = logits(model, lm_source, tmp_path / "apart.onnx")
    blocks = sum(node.op_type == "GroupQueryAttention" for node in model.graph)
    assert pack_projections(model) == 3 * blocks
    assert len(products(model)) == before - 3 * blocks
    assert [len(node.outputs) for node in model.graph if node.op_type == "Split"] == [2] * blocks
    np.testing.assert_array_equal(logits(model, lm_source, tmp_path / "packed.onnx"), apart)


def test_first_cores_of_factored_layers_are_one_product(lm_source: Path, tmp_path: Path) -> None:
    """Ranks may differ: what is behind each first core reads its own part."""
    ranks = dict.fromkeys([*PROJECTIONS, *MLP], 32) | {"q_proj": 64, "up_proj": 96}
    model = lowered(lm_source, tmp_path, dict.fromkeys(ranks, "int4-b32"), ranks)
    apart = logits(model, lm_source, tmp_path / "apart.onnx")
    blocks = sum(node.op_type == "GroupQueryAttention" for node in model.graph)
    assert pack_projections(model) == 3 * blocks
    assert sorted(len(n.outputs) for n in model.graph if n.op_type == "Split") == [2] * blocks + [3] * blocks
    np.testing.assert_array_equal(logits(model, lm_source, tmp_path / "packed.onnx"), apart)


@pytest.mark.parametrize("kind", ["Qwen2Config", "Qwen3Config"])
def test_what_stands_between_product_and_attention_stays_there(kind: str, tmp_path: Path) -> None:
    """Biases of query, key and value in the one, norms of query and key in the other."""
    source = write_causal_lm(tmp_path / "lm", config=kind)
    model = lowered(source, tmp_path, dict.fromkeys([*PROJECTIONS, *MLP], "int4-b32"))
    apart = logits(model, source, tmp_path / "apart.onnx")
    blocks = sum(node.op_type == "GroupQueryAttention" for node in model.graph)
    assert pack_projections(model) == 3 * blocks > 0
    np.testing.assert_array_equal(logits(model, source, tmp_path / "packed.onnx"), apart)


def test_large_products_stay_apart(lm_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt's copies would be large, and little is gained; attention takes what is packed without a copy."""
    monkeypatch.setattr(projections, "_MOST_SPLIT", 0)
    model = lowered(lm_source, tmp_path, dict.fromkeys([*PROJECTIONS, *MLP], "int4-b32"))
    blocks = sum(node.op_type == "GroupQueryAttention" for node in model.graph)
    assert pack_projections(model) == 2 * blocks
    assert not any(node.op_type == "Split" for node in model.graph)
