"""Causal LMs: a transformers folder in, its dense fp32 decoder graph in memory out.

The graph is onnxruntime-genai's (see `genai_builder` for why, and for what is corrected). Nothing dense is written to
disk and nothing is copied: initialisers are lazy views of the memory-mapped safetensors, cast to fp32 as they are read,
so a layer that is lowered is never materialised here.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers
from safetensors import safe_open

from edgec.errors import CheckpointError, EdgecError, ExportError, UsageError
from edgec.export.onnx.decoder_files import make_genai_config, write_tokenizer
from edgec.export.onnx.decoder_support import FAMILIES, architecture, check_supported, local_layers
from edgec.export.onnx.genai_builder import builders, patched, printing_to_log, small_tensors_to_fp32
from edgec.export.onnx.graph import DenseGraph, constant
from edgec.export.onnx.rotary import context_limit
from edgec.runtime.layout import FIRST_LOGITS

_log = logging.getLogger(__name__)

MAX_CONTEXT = 131_072
"""Longest context that is exported unless a longer one is asked for [positions]: its rotary tables ship with the model
(67 MB at head_dim 128), and the KV cache of a longer one fits no device that edgec aims at."""

_SAFETENSORS_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class DecoderGraph(DenseGraph):
    """A dense decoder graph, and what its onnxruntime-genai folder needs beside the model.

    Graph inputs: input_ids [batch, sequence] int64, attention_mask [batch, past + sequence] int64, position_ids
    [batch, sequence] int64 (only where head_dim is no multiple of 16), past_key_values.{i}.{key,value}
    [batch, kv_heads, past, head_dim] fp32, and FIRST_LOGITS with its default, see `select_positions`. Outputs: logits
    [batch, 1 or as many as asked for, vocab] fp32, present.{i}.{key,value}. The head's MatMul may produce the graph
    output "logits" itself: replace its output there too.

    head, embedding: module names, such as "lm_head" and "model.embed_tokens". tied: whether they are one table; the two
        nodes have separate initialisers over the same memory ([d, V] and [V, d]), see `share_tied_table`.
    source: the transformers folder. context_length: [positions]. genai_config: content of genai_config.json.
    """

    source: Path
    head: str
    embedding: str
    tied: bool
    context_length: int
    genai_config: Mapping[str, Any]


def build_decoder(model_folder: Path, work: Path, *, context_length: int | None = None) -> DecoderGraph:
    """The dense fp32 graph of the causal LM in `model_folder`.

    work: an existing folder for the builder's temporary files (a few kB).
    context_length: longest sequence to support [positions]; by default the model's own, at most MAX_CONTEXT.
    """
    config = load_config(model_folder)
    check_supported(config)
    context = _context(config, context_length)
    model = _load_model(model_folder, config)
    genai = _make_builder(model, config, context, work)
    try:
        with printing_to_log():
            genai.make_model(str(model_folder))
        genai.model.graph.sort()
        genai_config = make_genai_config(genai, config, model_folder, work)
    except EdgecError:
        raise
    except Exception as error:
        raise ExportError(f"building the decoder graph of {model_folder} failed: {_one_line(error)}") from error
    linears, embeddings = _map_modules(model, genai)
    head, embedding = (
        _module_name(model, module) for module in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    select_positions(genai.model, linears[head])
    return DecoderGraph(
        model=genai.model,
        linears=linears,
        embeddings=embeddings,
        source=model_folder,
        head=head,
        embedding=embedding,
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        context_length=context,
        genai_config=genai_config,
    )


def load_config(model_folder: Path) -> Any:
    """The transformers config of a folder, from local files and transformers' own classes only."""
    if not (model_folder / "config.json").is_file():
        raise CheckpointError(f"{model_folder} has no config.json; expected a transformers folder")
    if (model_folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{model_folder} holds a PEFT adapter (adapter_config.json); merge it into its model first"
        )
    try:
        return transformers.AutoConfig.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{model_folder / 'config.json'} cannot be used: {_one_line(error)}") from error


def write_runtime_files(graph: DecoderGraph, out: Path) -> None:
    """Everything that an onnxruntime-genai folder needs but model.onnx and model.onnx.data, into the existing folder
    `out`.
    """
    text = json.dumps(graph.genai_config, indent=2, ensure_ascii=False)
    (out / "genai_config.json").write_text(text + "\n", encoding="utf-8")
    write_tokenizer(graph.source, graph.context_length, out)


def select_positions(model: ir.Model, head: ir.Node) -> None:
    """Give the head the last position only, or as many as the input FIRST_LOGITS asks for.

    A prompt's other logits are of no use to who generates, and they are large: 128 tokens of a vocabulary of 128,256
    are 66 MB, and the head is a tenth to a third of a prompt's work. onnxruntime-genai's builder can prune its heads
    for good (`prune_lm_head`), which leaves a graph that nobody can evaluate but token by token. Here the Slice starts
    at an initialiser that is also an input (ONNX's "default value"): runtimes that do not know it never see it, and
    `OrtDecoder` sets it to 0. genai reads from the declared shape, [batch, 1, vocab], that a head is pruned.
    """
    hidden = head.inputs[0]
    if hidden is None:
        raise ExportError("mapping nodes to modules: the head has lost its input")
    first, last, axis = (
        _number(FIRST_LOGITS, -1), _number("edgec.last_logits", np.iinfo(np.int64).max), _number("edgec.logits_axis", 1)
    )
    for value in (first, last, axis):
        model.graph.register_initializer(value)
    model.graph.inputs.append(first)
    selected = ir.Value(name="edgec.selected", type=hidden.type)
    node = ir.node("Slice", [hidden, first, last, axis], outputs=[selected], name="edgec.select_positions")
    model.graph.insert_before(head, node)
    head.replace_input_with(0, selected)
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    if logits.shape is None:
        raise ExportError("the builder's graph does not say what shape its logits have")
    logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])


def _number(name: str, value: int) -> ir.Value:
    """An int64 constant of shape [1]."""
    return constant(ir.tensor(np.array([value], np.int64), name=name))


def share_tied_table(graph: DecoderGraph) -> bool:
    """Store a tied table once where head and embedding are both still dense; returns whether it did.

    Call it after the lowering: a table of which a node was lowered needs no sharing, since its bytes are in the lowered
    form. The head becomes FusedMatMul(x, table, transB=1) on the embedding's [V, d] initialiser. The builder's own
    form, a Transpose in front of the Gather, makes onnxruntime fold a third copy into RAM as it loads (a table of 0.5
    GB: peak 1.6 GB against 1.1 GB, equal speed).
    """
    head, gather = graph.linears[graph.head], graph.embeddings[graph.embedding]
    if not graph.tied or head.graph is None or gather.graph is None:
        return False
    table, weight = gather.inputs[0], head.inputs[1]
    if table is None or weight is None:
        raise ExportError(f"{graph.head} or {graph.embedding} has lost its weight")
    fused = ir.node(
        "FusedMatMul",
        [head.inputs[0], table],
        {"transB": 1},
        domain="com.microsoft",
        outputs=[ir.Value(name="", type=head.outputs[0].type, shape=head.outputs[0].shape)],
        name=head.name,
    )
    name = head.outputs[0].name
    ir.convenience.replace_nodes_and_values(head.graph, head, [head], [fused], head.outputs, fused.outputs)
    fused.outputs[0].name = name
    graph.model.graph.initializers.pop(str(weight.name))
    return True


def _context(config: Any, asked: int | None) -> int:
    limit = context_limit(config)
    if asked is None:
        context = min(limit, MAX_CONTEXT)
        if context < int(config.max_position_embeddings):
            _log.warning(
                "exporting a context of %d positions, not the model's %d", context, config.max_position_embeddings
            )
        return context
    if not 1 <= asked <= limit:
        raise UsageError(f"context length {asked}: this model's graph can have 1 to {limit} positions")
    return asked


def _load_model(folder: Path, config: Any) -> Any:
    """The torch model, its matrices views of the mapped files; norm weights and biases fp32.

    transformers maps a tensor without a copy when asked for the type that the file has, and copies it otherwise, so the
    type is the file's. Mixed files are loaded as fp32.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no *.safetensors file; pickle checkpoints are not read: convert it first")
    loader: Any = transformers.AutoModelForCausalLM
    progress = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, loading = loader.from_pretrained(
            folder,
            config=copy.deepcopy(config),
            dtype=_file_dtype(files),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="eager",  # a config may name an implementation that transformers would download
            output_loading_info=True,
        )
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be loaded: {_one_line(error)}") from error
    finally:
        if progress:
            transformers.utils.logging.enable_progress_bar()
    missing = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if missing:
        raise CheckpointError(f"{folder} lacks the tensor {missing[0]} ({len(missing)} missing or of another shape)")
    small_tensors_to_fp32(model)
    return model.eval()


def _file_dtype(files: list[Path]) -> torch.dtype:
    found: set[str] = set()
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as tensors:
                found.update(tensors.get_slice(key).get_dtype() for key in tensors.keys())  # noqa: SIM118
        except Exception as error:
            raise CheckpointError(f"{file} is no readable safetensors file: {_one_line(error)}") from error
    found = {name for name in found if "F" in name}  # the others are indices and masks
    return _SAFETENSORS_TYPES.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def _make_builder(model: Any, config: Any, context: int, work: Path) -> Any:
    settings = copy.deepcopy(config)  # the builder flattens nested settings into its config
    settings.max_position_embeddings = context
    settings.rope_local_base_freq = None  # read by Gemma 3's constructor, for a table that is not made
    name = architecture(config)
    with printing_to_log():
        genai = patched(getattr(builders(), FAMILIES[name]))(model, local_layers(config), context, settings, work)
    if name == "Gemma3ForCausalLM":
        genai.model_type = "gemma3_text"  # as builder.create_model does
    return genai


def _map_modules(model: Any, genai: Any) -> tuple[dict[str, ir.Node], dict[str, ir.Node]]:
    """Every nn.Linear and nn.Embedding of the model with its node; each weight is one initialiser with one use."""
    nodes = {node.name: node for node in genai.model.graph}
    linears: dict[str, ir.Node] = {}
    embeddings: dict[str, ir.Node] = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            continue
        linear = isinstance(module, torch.nn.Linear)
        node = nodes.get(genai.module_nodes.get(id(module)))
        weight = None if node is None else node.inputs[1 if linear else 0]
        if node is None or node.op_type != ("MatMul" if linear else "Gather"):
            raise ExportError(f"mapping nodes to modules: the builder's graph has no node for {name}")
        if weight is None or not weight.is_initializer() or len(weight.uses()) != 1:
            raise ExportError(f"mapping nodes to modules: the weight of {name} is not an initialiser of its own")
        expected = tuple(reversed(module.weight.shape)) if linear else tuple(module.weight.shape)
        if weight.shape is None or tuple(weight.shape.numpy()) != expected:
            raise ExportError(f"mapping nodes to modules: {name} has the shape {weight.shape}, expected {expected}")
        (linears if linear else embeddings)[name] = node
    return linears, embeddings


def _module_name(model: Any, module: Any) -> str:
    return next(str(name) for name, candidate in model.named_modules() if candidate is module)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
