"""The encoder front end: a dense BERT-like transformers model in, a `DenseGraph` out.

torch's dynamo exporter writes the graph, because it follows any model that transformers can run and notes which module
each node came from. Tools with a table of architectures (onnxruntime's transformer optimizer, optimum's ONNX configs)
were turned down: the first fuses none of the attentions that dynamo writes. `fusion` then puts operators of onnxruntime
in place, but leaves q, k and v apart, because a plan may treat the three differently.
"""

from __future__ import annotations

import ast
import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
import transformers
from numpy.typing import NDArray
from onnx_ir.passes import common as passes
from torch import Tensor, nn

from edgec.errors import ExportError, UnsupportedModelError
from edgec.export.onnx.fusion import MODULE, fuse, simplify
from edgec.export.onnx.graph import DenseGraph
from edgec.pooling import Pooling, read_pooling

__all__ = ["TASKS", "DenseGraph", "Pooling", "export_encoder", "read_pooling"]

TASKS = ("feature-extraction", "sentence-similarity")
"""optimum's names of the tasks that this front end exports."""

OPSET = 21
"""The first in which QuantizeLinear takes a scale per block, which weights for int8 products are unpacked with."""

_SCOPES = "pkg.torch.onnx.name_scopes"
_PREFIX = "model."
Layer = nn.Linear | nn.Embedding
_DUMMY = (2, 7)
"""Batch and sequence of the traced example: unlike each other, and unlike 0 and 1, which tracers take for constants."""


def export_encoder(
    model: transformers.PreTrainedModel, task: str, *, pooling: Pooling | None, fuse_attention: bool = True
) -> DenseGraph:
    """Export a dense fp32 encoder. Its weights are shared with the graph, not copied, and the model is left as it was.

    Inputs input_ids, attention_mask and, where the model tells segments apart, token_type_ids: int64 [batch_size,
    sequence_length]. Outputs last_hidden_state [batch_size, sequence_length, d] and, with pooling, sentence_embedding
    [batch_size, d], fp32. Raises UnsupportedModelError for what is refused before any work, ExportError when a stage
    failed.
    """
    if task not in TASKS:
        raise UnsupportedModelError(f"task {task!r}: the encoder front end exports {', '.join(TASKS)}")
    name = type(model).__name__
    wrapper = _Encoder(model, pooling)
    inputs = _example(model)
    with _evaluating(wrapper), _quiet():
        wanted = _reached(wrapper, inputs)
        try:
            program = torch.onnx.export(
                wrapper,
                tuple(inputs.values()),
                dynamo=True,
                optimize=False,  # by `simplify`, after the nodes are marked
                verbose=False,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=wrapper.output_names,
                dynamic_shapes=[{0: "batch_size", 1: "sequence_length"} for _ in inputs],
            )
        except Exception as error:  # the exporter documents no exception types
            raise ExportError(f"torch export of {name} failed: {_first_line(error)}") from error
        if program is None:
            raise ExportError(f"torch export of {name} gave no program")
        graph = program.model
        _check_dynamic(graph)
        _mark(graph, wanted)
        _plain_names(graph)
        try:
            simplify(graph)
            if fuse_attention:
                fuse(graph)
        except Exception as error:  # nor do onnxscript's rewriters
            raise ExportError(f"graph optimisation of {name} failed: {_first_line(error)}") from error
    linears, embeddings = _collect(graph, wanted)
    _strip(graph)
    return DenseGraph(graph, linears, embeddings)


class _Encoder(nn.Module):
    """The model with plain tensors in and out, and the pooling that sentence-transformers would run after it."""

    def __init__(self, model: transformers.PreTrainedModel, pooling: Pooling | None) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.output_names = ["last_hidden_state"] if pooling is None else ["last_hidden_state", "sentence_embedding"]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **segments)
        states = getattr(output, "last_hidden_state", None)
        if not isinstance(states, Tensor):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} returns no last_hidden_state; load the backbone with AutoModel"
            )
        return (states,) if self.pooling is None else (states, pool(states, attention_mask, self.pooling))


def pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """states [B, S, d], mask [B, S] → [B, d], as sentence-transformers' Pooling and Normalize modules compute it."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    if pooling.mode == "mean":
        pooled = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
    elif pooling.mode == "max":
        pooled = states.masked_fill(weights == 0, torch.finfo(states.dtype).min).amax(dim=1)
    else:  # the first token that is not padding: tokenizers may pad on the left
        first = mask.to(torch.int32).argmax(dim=1)
        pooled = states.gather(1, first[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)
    return nn.functional.normalize(pooled, dim=-1) if pooling.normalize else pooled


def _example(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Inputs to trace with, in the order that optimum gives them; token_type_ids where they can differ."""
    config = model.config
    vocabulary = int(getattr(config, "vocab_size", 0))
    if vocabulary < 1:
        raise UnsupportedModelError(f"{type(model).__name__}: no vocab_size in its config; expected a text encoder")
    batch, length = _DUMMY
    inputs = {
        "input_ids": torch.arange(batch * length).reshape(batch, length) % vocabulary,
        "attention_mask": torch.ones(batch, length, dtype=torch.int64),
    }
    inputs["attention_mask"][1, length - 2 :] = 0
    if "token_type_ids" in inspect.signature(model.forward).parameters and getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros(batch, length, dtype=torch.int64)
    return inputs


def _reached(wrapper: _Encoder, inputs: Mapping[str, Tensor]) -> dict[str, Layer]:
    """The linears and embeddings that the outputs depend on, by module name: those the graph must hold.

    Asked of autograd, so that it is known without the exporter and without a table of names: a pooler whose output is
    not taken is not reached. No gradient is computed; the parameters are views that share the model's memory.
    """
    calls: Counter[nn.Module] = Counter()
    layers = {name: layer for name, layer in wrapper.model.named_modules() if isinstance(layer, Layer)}
    hooks = [layer.register_forward_pre_hook(lambda module, _: calls.update([module])) for layer in layers.values()]
    views = {name: p.detach().requires_grad_(p.is_floating_point()) for name, p in wrapper.named_parameters()}
    try:
        with torch.enable_grad():
            outputs = torch.func.functional_call(wrapper, views, tuple(inputs.values()))
    finally:
        for hook in hooks:
            hook.remove()
    leaves = {id(leaf) for leaf in _leaves(outputs)}
    weights = {id(p) for name, p in wrapper.named_parameters() if id(views[name]) in leaves}
    wanted = {name: layer for name, layer in layers.items() if id(layer.weight) in weights}
    for name, layer in wanted.items():
        if calls[layer] != 1:
            why = "layers share it" if calls[layer] else "its weight is used directly"
            raise UnsupportedModelError(f"{name} is called {calls[layer]} times ({why}); edgec needs one call of each")
        if layer.weight.dtype != torch.float32:
            raise ExportError(f"{name} is {layer.weight.dtype}; expected float32: load with dtype=torch.float32")
    return wanted


def _leaves(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """The leaf tensors that outputs were computed from, by a walk over autograd's graph."""
    todo: list[Any] = [output.grad_fn for output in outputs]
    seen = set(todo)
    while todo:
        step = todo.pop()
        if step is None:
            continue
        if isinstance(variable := getattr(step, "variable", None), Tensor):
            yield variable
        following = {function for function, _ in step.next_functions} - seen
        seen |= following
        todo.extend(following)


def _mark(model: ir.Model, wanted: Mapping[str, Layer]) -> None:
    """Write each wanted module's name on its MatMul or Gather, making a plain MatMul of every linear on the way."""
    for node in list(model.graph):
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        name = scopes[-2].removeprefix(_PREFIX) if len(scopes) > 1 else ""
        layer = wanted.get(name)
        if isinstance(layer, nn.Embedding) and node.op_type == "Gather":
            node.metadata_props[MODULE] = name
        elif isinstance(layer, nn.Linear) and node.op_type in ("MatMul", "Gemm"):
            _as_matmul(model.graph, node, name).metadata_props[MODULE] = name


def _as_matmul(graph: ir.Graph, node: ir.Node, name: str) -> ir.Node:
    """The linear's node as a MatMul whose weight is an initializer [in, out], a view of torch's memory.

    The exporter writes MatMul(x, Transpose(W)), or Gemm(x, W, b) for x of rank 2; the latter's bias becomes an Add.
    """
    x, operand = node.inputs[0], node.inputs[1]
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    producer = operand.producer() if operand is not None else None
    if producer is not None and producer.op_type == "Transpose":
        operand, transposed = producer.inputs[0], not transposed
    if operand is None or operand.const_value is None or not transposed:
        raise ExportError(f"{name}: torch exported its linear as a {node.op_type} that edgec does not know")
    weight = _initializer(graph, f"{name}.weight_t", operand.const_value.numpy().T)
    if node.op_type == "MatMul":
        node.replace_input_with(1, weight)
        return node
    old = node.outputs[0]
    matmul = ir.node("MatMul", [x, weight])
    new = [matmul]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        new.append(ir.node("Add", [matmul.outputs[0], node.inputs[2]]))
    for each in new:
        each.outputs[0].type, each.outputs[0].shape = old.type, old.shape
    graph.insert_before(node, new)
    new[-1].outputs[0].name = old.name
    old.replace_all_uses_with(new[-1].outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return matmul


def _collect(model: ir.Model, wanted: Mapping[str, Layer]) -> tuple[dict[str, ir.Node], dict[str, ir.Node]]:
    """Find the marked nodes again; give each its module's name and, unless torch ties it, a weight of its own."""
    nodes: dict[str, ir.Node] = {}
    for node in model.graph:
        name = node.metadata_props.get(MODULE)
        if name is not None and node.op_type in ("MatMul", "Gather"):
            if name in nodes:
                raise ExportError(f"{name}: the graph has two {node.op_type} nodes for it; expected one")
            nodes[name] = node
    owners = Counter(id(layer.weight) for layer in wanted.values())
    linears: dict[str, ir.Node] = {}
    embeddings: dict[str, ir.Node] = {}
    for name, layer in wanted.items():
        lookup = isinstance(layer, nn.Embedding)
        if name not in nodes:
            raise ExportError(f"{name}: the graph has no {'Gather' if lookup else 'MatMul'} for it; expected one")
        node = nodes[name]
        index, suffix = (0, "weight") if lookup else (1, "weight_t")
        weight, shape = node.inputs[index], tuple(layer.weight.shape if lookup else layer.weight.shape[::-1])
        if weight is None or weight.const_value is None or len(node.outputs) != 1:
            raise ExportError(f"{name}: expected a {node.op_type} with one output, its weight an initializer")
        if tuple(weight.const_value.shape) != shape:
            raise ExportError(f"{name}: its weight is {tuple(weight.const_value.shape)} in the graph, expected {shape}")
        if len(weight.uses()) > 1 and owners[id(layer.weight)] == 1:
            # Equal by chance (two zero matrices, say) and merged by the optimiser: replacing one must leave the other.
            node.replace_input_with(index, _initializer(model.graph, f"{name}.{suffix}", weight.const_value.numpy()))
        node.name = f"{name}/{node.op_type}"
        (embeddings if lookup else linears)[name] = node
    return linears, embeddings


def _initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """A new fp32 initializer; the array is kept, not copied. The name gets a number when it is taken."""
    unique, taken = name, 1
    while unique in graph.initializers:
        unique, taken = f"{name}_{taken}", taken + 1
    value = ir.Value(name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
    value.const_value = ir.tensor(array, name=unique)
    graph.register_initializer(value)
    return value


def _check_dynamic(graph: ir.Model) -> None:
    """Raises ExportError when the tracer took the batch or the length of the example for a constant."""
    for value in graph.graph.inputs:
        dims = [str(dim.value) if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape or ()]
        if dims != ["batch_size", "sequence_length"]:
            raise ExportError(f"torch export fixed {value.name} to {dims}; expected [batch_size, sequence_length]")


def _plain_names(graph: ir.Model) -> None:
    """Name weights as the transformers model does, without the wrapper's prefix."""
    for value in list(graph.graph.initializers.values()):
        if value.name and value.name.startswith(_PREFIX):
            value.name = value.name.removeprefix(_PREFIX)


def _strip(model: ir.Model) -> None:
    """Remove all metadata and doc strings: half a megabyte, and paths of the machine that ran the export."""
    passes.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off, and each module's own mode back afterwards."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says about itself: nothing here that a user of edgec could act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch.export pickles its own deprecated class.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            # Inputs that share an axis share its name, which is what was asked for; which ones do depends on the model.
            warnings.filterwarnings("ignore", r"# The axis name: \w+ will not be used", UserWarning)
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
