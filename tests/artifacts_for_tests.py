"""Small artifacts that runtime and bench tests share, built in code: no downloads, no files in the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from edgec.bench import shapes
from edgec.bench.baselines import make

_TEXT = "[PAD] [UNK] the a cat dog sat on mat of and is model text The"
WORDS = _TEXT.split()
WIDTH = 8


def encoder(folder: Path, *, pooled: bool, table: np.ndarray[Any, Any] | None = None) -> Path:
    """An encoder that looks words up in a table [V, 8]: last_hidden_state, or its masked mean as sentence_embedding."""
    folder.mkdir(parents=True)
    if table is None:
        table = np.random.default_rng(0).standard_normal((len(WORDS), WIDTH)).astype(np.float32)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"], name="words")]
    initializers = [numpy_helper.from_array(table, "table")]
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "tokens", WIDTH])
    if pooled:
        axis = numpy_helper.from_array(np.array([1]), "axis")
        last = numpy_helper.from_array(np.array([2]), "last")
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["weights"]),
            helper.make_node("Mul", ["last_hidden_state", "weights"], ["weighted"]),
            helper.make_node("ReduceSum", ["weighted", "axis"], ["total"], keepdims=0),
            helper.make_node("ReduceSum", ["weights", "axis"], ["count"], keepdims=0),
            helper.make_node("Div", ["total", "count"], ["mean"]),
            helper.make_node("MatMul", ["mean", "head"], ["sentence_embedding"], name="head"),
        ]
        initializers += [axis, last, numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32), "head")]
        output = helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", WIDTH])
    names = ["input_ids", "attention_mask"] if pooled else ["input_ids"]
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "tokens"]) for n in names]
    graph = helper.make_graph(nodes, "encoder", inputs, [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    write_tokenizer(folder)
    config = {"model_type": "bert", "hidden_size": WIDTH, "max_position_embeddings": 6, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_tokenizer(folder: Path) -> None:
    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def tiny_lm(base: Path) -> Path:
    """The shape llama-tiny as an onnxruntime-genai fp32 folder; built once per test session (seconds)."""
    folder = base / "shared-tiny-lm-fp32"
    if not folder.exists():
        checkpoint = base / "shared-tiny-lm"
        if not checkpoint.exists():
            shapes.write("llama-tiny", checkpoint)
        make("fp32", "causal-lm", checkpoint, folder)
    return folder
