"""The files beside a decoder's graph, and what is refused or must not happen on the way to them."""

from __future__ import annotations

import json
import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime_genai as og  # type: ignore[import-untyped]
import pytest
from decoder_cases import (
    VOCABULARY,
    Exported,
    edit_config,
    generate,
    make_config,
    make_tokenizer,
    save,
    torch_greedy,
    write_runtime_folder,
)
from safetensors.torch import load_file, save_file

from edgec.errors import CheckpointError, UnsupportedModelError
from edgec.export.onnx import decoder_support
from edgec.export.onnx.decoder import build_decoder


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


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"head_dim": 12}, r"head_dim 12.*multiples of 8 \(8 or 16 would do.*use a GGUF target: ggml"),
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
