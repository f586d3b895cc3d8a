"""The decoder front end against torch and in onnxruntime-genai, on a small random model of every family."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime  # type: ignore[import-untyped]
import onnxruntime_genai as og  # type: ignore[import-untyped]
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgec.errors import CheckpointError, ExportError, UnsupportedModelError, UsageError
from edgec.export.onnx import decoder, decoder_support, genai_builder
from edgec.export.onnx.decoder import DecoderGraph, build_decoder, share_tied_table, write_runtime_files

ASSETS = Path(os.environ.get("EDGEC_ASSETS", Path(__file__).parents[3] / "../shared/assets"))
AUTO: Any = transformers.AutoModelForCausalLM

VOCABULARY = 272  # three special tokens, the 256 bytes, and some that no text gives
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.1] * 8,
    "long_factor": [2.0] * 8,
    "factor": 2.0,
    "original_max_position_embeddings": 48,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

# name: (config class, what differs from SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "smollm": (
        "LlamaConfig",
        {"tie_word_embeddings": True, "hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "phi3": ("Phi3Config", {"head_dim": None}),
    "gemma": ("GemmaConfig", {"hidden_size": 96}),  # sqrt(96) is not what the builder rounds it to
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 16, "sliding_window": 7}),
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 16, "sliding_window": 7, "sliding_window_pattern": 2}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, head_dim 8": ("LlamaConfig", {"head_dim": 8}),
    "llama, head_dim 24": ("LlamaConfig", {"head_dim": 24}),
    "llama, biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 scaling": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama, yarn scaling": ("LlamaConfig", {"rope_parameters": YARN}),
    "llama, width of a projection = vocabulary": ("LlamaConfig", {"intermediate_size": VOCABULARY}),
    "mistral, window": ("MistralConfig", {"sliding_window": 7}),
    "qwen2, window in the second layer": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "phi3, window": ("Phi3Config", {"head_dim": None, "sliding_window": 7}),
    "phi3, longrope": ("Phi3Config", {"head_dim": None, "rope_parameters": LONGROPE}),
    "phi3, head_dim 8": ("Phi3Config", {"head_dim": None, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "phi3, half of the head rotated": (
        "Phi3Config",
        {
            "head_dim": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "phi3, half of a wide head rotated": (
        "Phi3Config",
        {
            "head_dim": None,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "gemma3, two rope scalings": (
        "Gemma3TextConfig",
        {
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": GEMMA3_ROPE,
        },
    ),
    "smollm3, head_dim 8 and windows": (
        "SmolLM3Config",
        {"head_dim": 8, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 7},
    ),
}

IN_GENAI = [*FAMILIES, "llama, head_dim 8", "mistral, window", "phi3, longrope", "phi3, head_dim 8"]


def make_config(name: str) -> Any:
    kind, changes = (FAMILIES | VARIANTS)[name]
    settings = SIZES | changes
    if settings["head_dim"] is None:
        del settings["head_dim"]
    if kind == "Phi3Config":
        settings.setdefault("original_max_position_embeddings", 48 if "longrope" in name else 64)
    return getattr(transformers, kind)(**settings)


def make_model(config: Any, seed: int = 0) -> Any:
    """Random weights large enough that attention is not uniform, and that no norm or bias is trivial."""
    torch.manual_seed(seed)
    model = AUTO.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = noise * 0.15 if parameter.ndim > 1 else parameter.data + 0.3 * noise
    return model


def make_tokenizer() -> Any:
    """Byte-level BPE without merges: one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    make: Any = transformers.PreTrainedTokenizerFast
    return make(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save(folder: Path, model: Any, tokenizer: bool = True) -> Path:
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


def write_runtime_folder(graph: DecoderGraph, out: Path) -> Path:
    out.mkdir()
    ir.save(graph.model, out / "model.onnx", external_data="model.onnx.data")
    write_runtime_files(graph, out)
    return out


@dataclass
class Exported:
    model: Any
    source: Path
    graph: DecoderGraph
    folder: Path


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    done: dict[str, Exported] = {}

    def make(name: str) -> Exported:
        if name not in done:
            base = tmp_path_factory.mktemp("decoder")
            model = make_model(make_config(name))
            source = save(base / "source", model)
            graph = build_decoder(source, base)
            share_tied_table(graph)
            done[name] = Exported(model, source, graph, write_runtime_folder(graph, base / "out"))
        return done[name]

    return make


class Decoder:
    """The graph with its KV cache, as onnxruntime runs it."""

    def __init__(self, folder: Path, batch: int) -> None:
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        settings = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        self.inputs = {value.name for value in self.session.get_inputs()}
        self.past, self.batch = 0, batch
        empty = np.zeros((batch, settings["num_key_value_heads"], 0, settings["head_size"]), np.float32)
        self.cache = {name: empty for name in self.inputs if name.startswith("past_key_values")}

    def __call__(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """ids [batch, n] → logits [batch, n, vocabulary]."""
        end = self.past + ids.shape[1]
        feed = {"input_ids": ids, "attention_mask": np.ones((self.batch, end), np.int64), **self.cache}
        if "position_ids" in self.inputs:
            feed["position_ids"] = np.tile(np.arange(self.past, end), (self.batch, 1))
        names = [value.name for value in self.session.get_outputs()]
        outputs: dict[str, Any] = dict(zip(names, self.session.run(names, feed), strict=True))
        logits: NDArray[np.float32] = outputs.pop("logits")
        self.cache = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
        self.past = end
        return logits


def generate(folder: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens after `prompt` by onnxruntime-genai."""
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


@torch.no_grad()
def torch_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return [int(token) for token in ids[0, len(prompt) :]]


def relative(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def check_logits(exported: Exported) -> None:
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = exported.model(ids).logits.numpy()
    assert relative(Decoder(exported.folder, 2)(ids.numpy()), expected) < 1e-4
    step = Decoder(exported.folder, 2)
    pieces = [step(ids.numpy()[:, :6])] + [step(ids.numpy()[:, i : i + 1]) for i in range(6, 24)]
    assert relative(np.concatenate(pieces, axis=1), expected) < 1e-4


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


def test_runtime_files_say_what_the_checkpoint_says(export: Callable[[str], Exported], tmp_path: Path) -> None:
    source = save(tmp_path / "source", export("llama").model)
    (source / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 5], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20})
    )
    out = write_runtime_folder(build_decoder(source, tmp_path), tmp_path / "out")
    config = json.loads((out / "genai_config.json").read_text())
    assert config["model"]["type"] == "llama"
    assert config["model"]["context_length"] == 64
    assert config["model"]["vocab_size"] == VOCABULARY
    assert config["model"]["eos_token_id"] == [2, 5]
    assert (config["model"]["bos_token_id"], config["model"]["pad_token_id"]) == (1, 0)
    assert config["model"]["decoder"]["filename"] == "model.onnx"
    assert "position_ids" not in config["model"]["decoder"]["inputs"]
    search = config["search"]
    assert (search["do_sample"], search["temperature"], search["top_p"], search["top_k"]) == (True, 0.6, 0.9, 20)
    assert search["max_length"] == 64
    assert generate(out, [1, 70, 111], 4)


def test_position_ids_are_declared_where_the_graph_has_them(export: Callable[[str], Exported]) -> None:
    inputs = export("llama, head_dim 8").graph.genai_config["model"]["decoder"]["inputs"]
    assert inputs["position_ids"] == "position_ids"


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


def test_genai_tokenizes_like_transformers(export: Callable[[str], Exported]) -> None:
    folder = export("qwen3").folder
    reference, tokenizer = make_tokenizer(), og.Tokenizer(og.Model(str(folder)))
    for text in ("Hello, world", "  two  spaces\n\ttab", "naïve 日本語 🙂"):
        expected = reference(text, add_special_tokens=False)["input_ids"]
        assert [int(token) for token in tokenizer.encode(text)] == expected
        assert tokenizer.decode(expected) == text


def test_the_tokenizer_is_copied_but_for_code_and_absurd_lengths(
    export: Callable[[str], Exported], tmp_path: Path
) -> None:
    source = save(tmp_path / "source", export("llama").model)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"model_max_length": int(1e30), "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    out = write_runtime_folder(build_decoder(source, tmp_path), tmp_path / "out")
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert written["model_max_length"] == 64 and "auto_map" not in written
    tokenizer = og.Tokenizer(og.Model(str(out)))
    assert tokenizer.apply_chat_template('[{"role": "user", "content": "hi"}]') == "hi"


def test_a_model_without_tokenizer_works_with_token_ids(export: Callable[[str], Exported], tmp_path: Path) -> None:
    model = export("llama").model
    source = save(tmp_path / "source", model, tokenizer=False)
    out = write_runtime_folder(build_decoder(source, tmp_path), tmp_path / "out")
    assert not list(out.glob("tokenizer*"))
    tokens = generate(out, [1, 70, 111], 8)
    assert tokens == torch_greedy(model, [1, 70, 111], len(tokens))


def test_without_any_end_token_the_message_says_what_to_add(export: Callable[[str], Exported], tmp_path: Path) -> None:
    source = save(tmp_path / "source", export("llama").model, tokenizer=False)
    (source / "generation_config.json").unlink()
    edit_config(source, eos_token_id=None)
    with pytest.raises(CheckpointError, match="add eos_token_id to config.json"):
        build_decoder(source, tmp_path)


def test_an_end_token_beyond_the_vocabulary_is_refused(export: Callable[[str], Exported], tmp_path: Path) -> None:
    source = save(tmp_path / "source", export("llama").model, tokenizer=False)
    (source / "generation_config.json").unlink()
    edit_config(source, eos_token_id=5000)
    with pytest.raises(CheckpointError, match="eos_token_id 5000"):
        build_decoder(source, tmp_path)


def test_unnamed_special_tokens_are_not_invented(export: Callable[[str], Exported], tmp_path: Path) -> None:
    source = save(tmp_path / "source", export("llama").model, tokenizer=False)
    (source / "generation_config.json").unlink()
    edit_config(source, bos_token_id=None, pad_token_id=-1)
    out = write_runtime_folder(build_decoder(source, tmp_path), tmp_path / "out")
    settings = json.loads((out / "genai_config.json").read_text())["model"]
    assert "bos_token_id" not in settings and settings["pad_token_id"] == 2
    assert generate(out, [70, 111], 4)


def edit_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"head_dim": 12}, r"head_dim 12.*multiples of 8 \(8 or 16 would do.*GGUF target, when it lands"),
        ("llama", {"head_dim": 4}, r"head_dim 4.*\(8 would do"),
        ("llama", {"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM is not among"),
        ("llama", {"architectures": None}, "names 0 architectures"),
        ("llama", {"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, "names 2 architectures"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantised"),
        ("llama", {"hidden_act": "tanh"}, "activation 'tanh'"),
        ("llama", {"num_key_value_heads": 3}, "multiple of the second"),
        ("llama", {"num_hidden_layers": 100_000}, "num_hidden_layers is 100000"),
        ("llama", {"vocab_size": 1 << 40}, "vocab_size"),
        ("mistral", {"sliding_window": 0}, "sliding_window 0"),
        ("gemma", {"use_bidirectional_attention": True}, "no causal LM"),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    ],
)
def test_what_onnxruntime_cannot_run_is_refused_with_the_reason(
    name: str, changes: dict[str, Any], message: str
) -> None:
    config = make_config(name)
    config.architectures = [
        {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "gemma": "GemmaForCausalLM"}.get(
            name, "Qwen3ForCausalLM"
        )
    ]
    decoder_support.check_supported(config)
    for key, value in changes.items():
        object.__setattr__(config, key, value)
    with pytest.raises(UnsupportedModelError, match=message):
        decoder_support.check_supported(config)


def test_refusal_comes_before_any_work(export: Callable[[str], Exported], tmp_path: Path) -> None:
    source = save(tmp_path / "source", export("llama").model)
    (source / "model.safetensors").unlink()
    edit_config(source, head_dim=12)
    with pytest.raises(UnsupportedModelError):
        build_decoder(source, tmp_path)


def test_bad_folders_are_named(export: Callable[[str], Exported], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config.json"):
        build_decoder(tmp_path / "nowhere", tmp_path)
    source = save(tmp_path / "source", export("llama").model)
    tensors = load_file(source / "model.safetensors")
    removed = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}
    save_file(removed, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        build_decoder(source, tmp_path)
    (source / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(CheckpointError, match="no readable safetensors"):
        build_decoder(source, tmp_path)
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickle checkpoints are not read"):
        build_decoder(source, tmp_path)
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge it"):
        build_decoder(source, tmp_path)


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


def test_nothing_of_the_checkpoint_is_executed_and_no_network_is_asked(
    export: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "source", export("llama").model)
    marker = tmp_path / "executed"
    (source / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    edit_config(source, auto_map=auto_map, attn_implementation="evil/kernel", _attn_implementation="evil/kernel")
    settings = json.loads((source / "tokenizer_config.json").read_text()) | {"auto_map": auto_map}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    write_runtime_folder(build_decoder(source, tmp_path), tmp_path / "out")
    assert not marker.exists()


def test_building_leaves_the_process_as_it_was(
    export: Callable[[str], Exported], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths, handlers = list(sys.path), list(logging.getLogger().handlers)
    build_decoder(export("llama").source, tmp_path)
    assert sys.path == paths
    assert logging.getLogger().handlers == handlers
    assert capfd.readouterr() == ("", "")


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
