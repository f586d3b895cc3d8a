"""Small random checkpoints as users have them on disk, and ways to ruin one; for pipeline, command and fault tests.

The matrices of the feed-forward blocks have a decaying spectrum, so that there is something to factor; those of
attention are Gaussian, so that there is something to call incompressible.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from decoder_cases import make_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from edgec.calibration import load_text

HIDDEN, FFN, LAYERS = 128, 256, 2
WORDS = 300


def _shape_spectra(model: transformers.PreTrainedModel) -> None:
    """Gaussian weights everywhere; in feed-forward blocks, tables and heads with singular values that fall like 1/k."""
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2:
            parameter.data += 0.05 * torch.randn_like(parameter)
            continue
        weight = torch.randn_like(parameter)
        if not any(part in name for part in ("attention", "attn")):
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            weight = u @ torch.diag(s / torch.arange(1, len(s) + 1) ** 0.7) @ vh
        parameter.data = weight * (1.5 / (weight.norm() / weight.shape[0] ** 0.5))


def word_tokenizer() -> Any:
    """A word-level tokenizer over the commonest words of the default text, with BERT's special tokens."""
    pre = pre_tokenizers.Whitespace()
    counts: dict[str, int] = {}
    for item in load_text().items:
        for word, _ in pre.pre_tokenize_str(item.lower()):
            counts[word] = counts.get(word, 0) + 1
    words = sorted(counts, key=lambda w: (-counts[w], w))[:WORDS]
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    make: Any = transformers.PreTrainedTokenizerFast
    return make(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )


def write_encoder(folder: Path, **changes: Any) -> Path:
    """A two-layer BERT of width 128 with a word tokenizer."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": WORDS + 20,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    model: Any = transformers.BertModel(transformers.BertConfig(**settings | changes), add_pooling_layer=False)
    _shape_spectra(model)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def write_causal_lm(folder: Path, config: str = "LlamaConfig", **changes: Any) -> Path:
    """A two-layer Llama, or what else the class of `config` is of, of width 128 with a byte tokenizer; the head is tied
    to the table.
    """
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(getattr(transformers, config)(**settings | changes))
    _shape_spectra(model)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path, seed: int = 0) -> Path:
    """A calibration file long enough for every split, and short enough to be quick."""
    items = load_text().items[seed : seed + 400]
    path.write_text("\n\n".join(items), encoding="utf-8")
    return path


def ruined(folder: Path, out: Path) -> Path:
    """A copy to ruin."""
    shutil.copytree(folder, out)
    return out


def set_weight(folder: Path, name: str, value: float) -> str:
    """Put a value into the first element of the tensor whose name ends so; returns the tensor's full name."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    full = next(n for n in tensors if n.endswith(name))
    tensors[full].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return full


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def tree(folder: Path) -> dict[str, str]:
    """Everything under a folder by relative path: file hashes, "dir" and link targets."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link {path.readlink()}"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "dir"
    return found


def folder_bytes(folder: Path) -> int:
    """Bytes of every file in it, as the file system reports them."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fit_only_once(patch: pytest.MonkeyPatch) -> None:
    """Exports ship the drafts that their plan was searched with."""
    patch.setattr("edgec.pipeline.exporting.refitted", lambda workspace, choices, drafts, *others: (drafts, ""))
