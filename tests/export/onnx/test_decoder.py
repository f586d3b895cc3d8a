"""The decoder front end against torch and in onnxruntime-genai, on a small random model of every family."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime_genai as og  # type: ignore[import-untyped]
import pytest
import torch
from decoder_cases import (
    ASSETS,
    AUTO,
    FAMILIES,
    IN_GENAI,
    VARIANTS,
    VOCABULARY,
    Decoder,
    Exported,
    check_logits,
    generate,
    make_config,
    make_model,
    relative,
    save,
    torch_greedy,
    write_runtime_folder,
)
from safetensors.torch import load_file

from edgec.errors import ExportError, UsageError
from edgec.export.onnx import decoder, genai_builder
from edgec.export.onnx.decoder import build_decoder, share_tied_table
from edgec.runtime.genai import GenaiModel
from edgec.runtime.layout import FIRST_LOGITS
from edgec.runtime.ort_decoder import OrtDecoder


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_logits_are_those_of_torch_in_prefill_and_one_by_one(name: str, export: Callable[[str], Exported]) -> None:
    check_logits(export(name))


@pytest.mark.parametrize("name", IN_GENAI)
def test_genai_generates_what_torch_does(name: str, export: Callable[[str], Exported]) -> None:
    exported = export(name)
    prompt = [1, 70, 111, 111, 98, 97, 114]
    tokens = generate(exported.folder, prompt, 20)
    assert tokens == torch_greedy(exported.model, prompt, len(tokens))
    assert len(tokens) == 20 or tokens[-1] == 2


def test_only_the_last_logits_are_computed_unless_others_are_asked_for(
    export: Callable[[str], Exported], tmp_path: Path
) -> None:
    folder = export("llama").folder
    ids = np.arange(3, 30)
    whole = OrtDecoder(folder).logits(ids)
    assert whole.shape == (27, VOCABULARY)
    plain = Decoder(folder, 1)
    plain.every_position = {}
    last = plain(ids[None])
    assert last.shape == (1, 1, VOCABULARY)
    np.testing.assert_allclose(last[0, 0], whole[-1], atol=1e-5)
    np.testing.assert_allclose(GenaiModel(folder).logits(ids), whole, atol=1e-4)
    # As other tools prune: nobody can ask for more. Such graphs are run token by token.
    shutil.copytree(folder, tmp_path / "pruned")
    proto = onnx.load(tmp_path / "pruned" / "model.onnx", load_external_data=False)
    proto.graph.input.remove(next(value for value in proto.graph.input if value.name == FIRST_LOGITS))
    (tmp_path / "pruned" / "model.onnx").write_bytes(proto.SerializeToString())
    np.testing.assert_allclose(OrtDecoder(tmp_path / "pruned").logits(ids), whole, atol=1e-4)
    assert OrtDecoder(tmp_path / "pruned").greedy(ids, 5) == OrtDecoder(folder).greedy(ids, 5)


@pytest.mark.parametrize("name", IN_GENAI)
def test_every_linear_and_embedding_is_mapped(name: str, export: Callable[[str], Exported], tmp_path: Path) -> None:
    exported = export(name)
    graph = build_decoder(exported.source, tmp_path)  # `export` has shared the tied table since
    modules = dict(exported.model.named_modules())
    wanted = {
        kind: {n for n, m in modules.items() if isinstance(m, kind)} for kind in (torch.nn.Linear, torch.nn.Embedding)
    }
    assert set(graph.linears) == wanted[torch.nn.Linear]
    assert set(graph.embeddings) == wanted[torch.nn.Embedding]
    nodes = {**graph.linears, **graph.embeddings}
    for module, node in nodes.items():
        weight = node.inputs[1 if module in graph.linears else 0]
        assert weight is not None and weight.const_value is not None
        assert weight.is_initializer() and len(weight.uses()) == 1 and len(node.outputs) == 1
        value = modules[module].weight.detach().numpy()
        np.testing.assert_array_equal(weight.const_value.numpy(), value.T if module in graph.linears else value)
    assert len({node.name for node in nodes.values()}) == len(nodes)
    assert graph.head == "lm_head" and graph.embedding == "model.embed_tokens"
    assert graph.tied == (exported.model.lm_head.weight is exported.model.model.embed_tokens.weight)


def test_a_node_can_be_replaced_by_another_program(export: Callable[[str], Exported], tmp_path: Path) -> None:
    """What the lowering does: two MatMuls in place of each one; the head's output stays the graph's."""
    exported = export("phi3")
    graph = build_decoder(exported.source, tmp_path)
    for name, node in graph.linears.items():
        weight = node.inputs[1]
        assert weight is not None and weight.const_value is not None and node.graph is not None
        u, s, vt = np.linalg.svd(weight.const_value.numpy(), full_matrices=False)
        factors = []
        for index, core in enumerate((u * s, vt)):
            value = ir.Value(name=f"{name}.core{index}", const_value=ir.tensor(core))
            node.graph.register_initializer(value)
            factors.append(value)
        first = ir.node("MatMul", [node.inputs[0], factors[0]], name=f"{node.name}/0")
        second = ir.node("MatMul", [first.outputs[0], factors[1]], name=f"{node.name}/1")
        output = node.outputs[0].name
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], [first, second], node.outputs, second.outputs)
        second.outputs[0].name = output
        graph.model.graph.initializers.pop(str(weight.name))
    check_logits(Exported(exported.model, exported.source, graph, write_runtime_folder(graph, tmp_path / "out")))


def test_a_tied_table_is_stored_once_when_both_sides_stay_dense(
    export: Callable[[str], Exported], tmp_path: Path
) -> None:
    shared = export("gemma").folder
    graph = build_decoder(export("gemma").source, tmp_path)
    apart = write_runtime_folder(graph, tmp_path / "apart")
    table = VOCABULARY * 96 * 4
    saved = (apart / "model.onnx.data").stat().st_size - (shared / "model.onnx.data").stat().st_size
    assert table <= saved < table + 8192  # external data is aligned
    check_logits(Exported(export("gemma").model, export("gemma").source, graph, apart))


def test_nothing_is_shared_where_a_side_was_lowered_or_nothing_is_tied(
    export: Callable[[str], Exported], tmp_path: Path
) -> None:
    assert not share_tied_table(build_decoder(export("llama").source, tmp_path))
    graph = build_decoder(export("gemma").source, tmp_path)
    gather = graph.embeddings["model.embed_tokens"]
    assert gather.graph is not None
    other = ir.node("Gather", gather.inputs, name="lowered")
    ir.convenience.replace_nodes_and_values(gather.graph, gather, [gather], [other], gather.outputs, other.outputs)
    assert not share_tied_table(graph)
    assert graph.linears["lm_head"].op_type == "MatMul"


def test_dense_weights_are_neither_written_nor_copied(export: Callable[[str], Exported], tmp_path: Path) -> None:
    graph = build_decoder(export("llama").source, tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 10_000
    for node in graph.linears.values():
        assert node.inputs[1] is not None
        assert isinstance(node.inputs[1].const_value, ir.LazyTensor)


def test_a_bf16_checkpoint_is_exported_at_full_precision(tmp_path: Path) -> None:
    """Gemma adds 1 to its norm weights: in bf16, 1 + 0.01 would be 1.0078."""
    model = make_model(make_config("gemma")).to(torch.bfloat16)
    source = save(tmp_path / "source", model)
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(source / "model.safetensors").values())
    graph = build_decoder(source, tmp_path)
    out = write_runtime_folder(graph, tmp_path / "out")
    reference = AUTO.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    check_logits(Exported(reference, source, graph, out))


def test_context_length_can_be_lowered(export: Callable[[str], Exported], tmp_path: Path) -> None:
    graph = build_decoder(export("llama").source, tmp_path, context_length=32)
    assert graph.genai_config["model"]["context_length"] == graph.context_length == 32
    assert graph.model.graph.initializers["cos_cache"].shape == ir.Shape([32, 8])
    for asked in (0, 65):
        with pytest.raises(UsageError, match="1 to 64"):
            build_decoder(export("llama").source, tmp_path, context_length=asked)


def test_longrope_is_exported_as_far_as_one_table_goes(export: Callable[[str], Exported]) -> None:
    assert export("phi3, longrope").graph.context_length == 48


def test_default_lengths_are_bounded(export: Callable[[str], Exported], tmp_path: Path) -> None:
    config = make_config("llama")
    config.max_position_embeddings = 1_000_000
    model = make_model(config)
    graph = build_decoder(save(tmp_path / "source", model), tmp_path)
    assert graph.context_length == decoder.MAX_CONTEXT
    assert graph.genai_config["search"]["max_length"] == 4096


def test_an_unmapped_module_is_an_error_that_names_it(
    export: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = genai_builder.patched

    def forgetful(base: Any) -> Any:
        class Forgetful(original(base)):  # type: ignore[misc]
            def make_matmul(self, matmul: Any, basename: str, root_input: str, **kwargs: Any) -> str:
                name = str(super().make_matmul(matmul, basename, root_input, **kwargs))
                if "layers.1/mlp/up_proj" in basename:
                    self.module_nodes.pop(id(matmul))
                return name

        return Forgetful

    monkeypatch.setattr(decoder, "patched", forgetful)
    with pytest.raises(ExportError, match=r"no node for model\.layers\.1\.mlp\.up_proj"):
        build_decoder(export("llama").source, tmp_path)


def test_stories260k_tells_the_documented_story(tmp_path: Path) -> None:
    source = ASSETS / "stories260K-hf"
    if not source.is_dir():
        pytest.skip(f"{source} is absent; set EDGEC_ASSETS")
    graph = build_decoder(source, tmp_path)
    share_tied_table(graph)
    out = write_runtime_folder(graph, tmp_path / "out")
    model = AUTO.from_pretrained(source, dtype=torch.float32).eval()
    tokens = generate(out, [1], 200)
    assert len(tokens) >= 100
    assert tokens == torch_greedy(model, [1], len(tokens))
    text = og.Tokenizer(og.Model(str(out))).decode(np.array(tokens, np.int32))
    assert text.strip().startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )
    ids = np.array([[1, *tokens]])
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    assert relative(Decoder(out, 1)(ids), expected) < 1e-5
    assert math.isclose(expected.std(), Decoder(out, 1)(ids).std(), rel_tol=1e-4)
