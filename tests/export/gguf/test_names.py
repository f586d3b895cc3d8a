"""Names and the order of rows: of whole matrices, quantised ones, and cores of factored ones."""

from __future__ import annotations

import numpy as np
import pytest
from decoder_cases import make_config

from edgec.errors import ExportError, UnsupportedModelError
from edgec.export.gguf.names import Names, architecture, permute_outputs, row_order, take_rows
from edgec.fit import fit
from edgec.quantize import rtn
from edgec.quantize.formats import CoreFormat, LayerFormat
from edgec.records import Spec

pytest.importorskip("gguf", reason="needs the extra edgec[gguf]")

Q, K, V = (f"model.layers.0.self_attn.{part}_proj" for part in "qkv")


def test_names_are_llama_cpps() -> None:
    names = Names("llama", 2)
    assert names.of("model.embed_tokens.weight") == "token_embd.weight"
    assert names.of("model.layers.1.mlp.down_proj.weight") == "blk.1.ffn_down.weight"
    assert Names("qwen2", 1).of(f"{Q}.bias") == "blk.0.attn_q.bias"
    assert Names("gemma2", 1).of("model.layers.0.pre_feedforward_layernorm.weight") == "blk.0.ffn_norm.weight"
    with pytest.raises(UnsupportedModelError, match="no place"):
        names.of("model.layers.0.mlp.experts.0.weight")
    with pytest.raises(UnsupportedModelError, match="llama, mistral, qwen2"):
        architecture("bert")


def test_pairs_of_a_head_become_neighbours() -> None:
    """Row i of a head's first half is followed by row i of its second half (llama.cpp's "normal" rotary layout)."""
    config = make_config("llama")  # 4 heads and 2 key heads of 16
    order = row_order(config, f"{Q}.weight")
    assert order is not None
    assert order[:4].tolist() == [0, 8, 1, 9]
    assert order[16:18].tolist() == [16, 24]
    assert sorted(order) == list(range(64))
    keys = row_order(config, K)
    assert keys is not None
    assert len(keys) == 32
    assert row_order(config, V) is None
    assert row_order(make_config("qwen2"), Q) is None


@pytest.mark.parametrize("fmt", ["int4-b32", "int4-b32-zp", "q4_k"])
def test_a_quantised_core_is_permuted_as_it_is(fmt: str) -> None:
    order = np.random.default_rng(0).permutation(64)
    core = fit(np.random.default_rng(1).standard_normal((64, 256)), Spec("dense"), LayerFormat.parse(fmt)).cores[
        "weight"
    ]
    moved = take_rows(core, order)
    np.testing.assert_array_equal(moved.dequantize(), core.dequantize()[order])  # type: ignore[union-attr]
    assert type(moved) is type(core)


@pytest.mark.parametrize(
    "spec",
    [
        Spec("dense"),
        Spec("svd", (32,)),
        Spec("residual", (32,)),
        Spec("disentangled", (), ((64, 1), (1, 3), (1, 32))),
        Spec("tucker", (32, 32)),
    ],
)
def test_factors_are_permuted_at_the_core_that_makes_the_outputs(spec: Spec) -> None:
    order = np.random.default_rng(0).permutation(64)
    factors = fit(np.random.default_rng(2).standard_normal((64, 96)), spec, CoreFormat.parse("int8-b32"))
    moved = permute_outputs(factors, order)
    np.testing.assert_allclose(moved.dense(), factors.dense()[order], atol=1e-5)
    assert moved.stored_bytes == factors.stored_bytes


def test_a_train_whose_outputs_come_from_several_cores_is_refused() -> None:
    spec = Spec("tensor_train", (8,), ((8, 8), (8, 12)))
    factors = fit(np.random.default_rng(3).standard_normal((64, 96)), spec, CoreFormat(32))
    with pytest.raises(ExportError, match="change places"):
        permute_outputs(factors, np.arange(64)[::-1])


def test_rounding_is_not_repeated() -> None:
    core = rtn.quantize(np.random.default_rng(4).standard_normal((8, 32)), CoreFormat.parse("int4-b32"))
    order = np.arange(8)[::-1]
    np.testing.assert_array_equal(take_rows(take_rows(core, order), order).codes, core.codes)  # type: ignore[union-attr]
