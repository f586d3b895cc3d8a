"""Small random models of every family, and the runtimes to compare them in; shared by the decoder tests."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime  # type: ignore[import-untyped]
import onnxruntime_genai as og  # type: ignore[import-untyped]
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgec.export.onnx.decoder import DecoderGraph, write_runtime_files
from edgec.runtime.layout import FIRST_LOGITS

ASSETS = Path(os.environ.get("EDGEC_ASSETS", Path(__file__).parents[1] / "../shared/assets"))
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


def make_config(name: str, **wider: Any) -> Any:
    kind, changes = (FAMILIES | VARIANTS)[name]
    settings = SIZES | changes | wider
    if settings["head_dim"] is None:
        del settings["head_dim"]
    if kind == "Phi3Config":
        settings.setdefault("original_max_position_embeddings", 48 if "longrope" in name else 64)
    return getattr(transformers, kind)(**settings)


def scaled_config(name: str) -> Any:
    """The same family twice as wide, so that ranks of 32 save something in most of its layers."""
    changes = SIZES | FAMILIES[name][1]
    doubled = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return make_config(name, **{key: 2 * changes[key] for key in doubled})


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


class Decoder:
    """The graph with its KV cache, as onnxruntime runs it."""

    def __init__(self, folder: Path, batch: int) -> None:
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        settings = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        self.inputs = {value.name for value in self.session.get_inputs()}
        self.every_position = {FIRST_LOGITS: np.zeros(1, np.int64)}
        self.past, self.batch = 0, batch
        empty = np.zeros((batch, settings["num_key_value_heads"], 0, settings["head_size"]), np.float32)
        self.cache = {name: empty for name in self.inputs if name.startswith("past_key_values")}

    def __call__(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """ids [batch, n] → logits [batch, n, vocabulary]."""
        end = self.past + ids.shape[1]
        feed = {"input_ids": ids, "attention_mask": np.ones((self.batch, end), np.int64), **self.cache}
        feed.update(self.every_position)
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


def edit_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))
