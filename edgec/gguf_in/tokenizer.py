"""The tokenizer of a GGUF as transformers' files, and proof that it splits text as llama.cpp does.

A GGUF names its pre-tokenizer and does not hold it, so any conversion is a guess; a wrong one goes unnoticed until the
model answers badly (llama.cpp #7476). Hence the probe: text of many kinds, split by llama.cpp from the file itself and
by the tokenizer made here. Where they differ the file is refused. llama.cpp runs in a process of its own, since it
aborts on vocabularies it dislikes. The expressions are transformers' own table; its converter was turned down, since
its classes add default tokens that a vocabulary may lack.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.tokenization_utils_base import generate_merges

from edgec import limits
from edgec.errors import CheckpointError
from edgec.gguf_header import GgufHeader
from edgec.modeling import quiet_transformers
from edgec.subprocesses import run

logger = logging.getLogger(__name__)

PROBES = (
    "Once upon a time there was a little girl.",
    "  leading spaces,  double spaces\nand\n\nnewlines\t and tabs  ",
    "don't I'LL we've CamelCase snake_case x+=1; f(a[3:7]) != {'k': 0.125}",
    "1234567 3.14159 2024-05-06 +49 30 1234",
    "naïve façade Ölfaß Žluťoučký 日本語のテキスト 한국어 العربية עברית ไทย",
    "emoji 😀👩‍👩‍👧 combining e\u0301 zero\u200bwidth",
    "",
)
_GPT2_SPLIT = frozenset({"gpt-2", "default", "phi-2", "roberta-bpe", "mpt", "olmo", "jais"})
"""Pre-tokenizers that are GPT-2's, or near enough to be tried."""
_WHOLE_WORDS_FIRST = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken"})
"""A word that is a token is not put together from merges (llama-vocab.cpp, `ignore_merges`)."""
_CONTROL, _USER_DEFINED = 3, 4
_MISSING = 3
"""Exit status of the probe where llama_cpp is not installed."""
_SPECIAL = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id"}
_SPECIAL |= {"pad_token": "padding_token_id"}


def write_tokenizer(header: GgufHeader, vocabulary: int, out: Path) -> None:
    """tokenizer.json, tokenizer_config.json, chat template and generation_config.json in the folder `out`.

    vocabulary: rows of the embedding table. Raises CheckpointError where the file's vocabulary does not fit it, cannot
    be rebuilt, or splits text differently from llama.cpp.
    """
    described = _described(header, vocabulary)
    tokens = described["tokens"]
    begins = header.flag("tokenizer.ggml.add_bos_token", described["tokenizer_type"] == "llama")
    ends = header.flag("tokenizer.ggml.add_eos_token", False)
    special = {name: tokens[i] for name, key in _SPECIAL.items() if (i := _id(header, key, vocabulary)) is not None}
    try:
        backend = build(described, special.get("unk_token"))
        backend.post_processor = _framing(
            special.get("bos_token") if begins else None, special.get("eos_token") if ends else None, tokens
        )
        with quiet_transformers():
            make: Any = transformers.PreTrainedTokenizerFast
            made = make(tokenizer_object=backend, **special)
            template = header.metadata.get("tokenizer.chat_template")
            made.chat_template = template if isinstance(template, str) else None
            made.save_pretrained(out)
    except Exception as error:  # tokenizers' errors share no base class
        told = " ".join(str(error).split())[:160] or type(error).__name__
        raise CheckpointError(f"{header.path}: its tokenizer cannot be rebuilt ({told})") from error
    if len(made) > vocabulary:
        raise CheckpointError(f"{header.path}: its tokenizer has {len(made)} tokens, the model {vocabulary} rows")
    ends_with = sorted(
        {i for key in ("eos_token_id", "eot_token_id") if (i := _id(header, key, vocabulary)) is not None}
    )
    defaults = {"bos_token_id": _id(header, "bos_token_id", vocabulary), "eos_token_id": ends_with or None}
    (out / "generation_config.json").write_text(json.dumps(defaults), encoding="utf-8")
    _compare(header, made, begins=begins, ends=ends)


def build(described: Mapping[str, Any], unknown: str | None) -> Tokenizer:
    """A tokenizer of the `tokenizers` library from a checked vocabulary.

    described: tokenizer_type "llama" (with scores) or "gpt2" (with merges and pre_tokenizer_type), tokens, token_type.
    """
    tokens = described["tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if described["tokenizer_type"] == "llama":
        # llama.cpp joins the neighbours whose union has the best score: every split of a token is a merge, ranked so.
        merges = generate_merges(vocabulary, dict(zip(tokens, described["scores"], strict=True)))
        model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        made = Tokenizer(model)
        steps: list[Any] = [normalizers.Prepend("▁")] if described["add_prefix_space"] else []
        made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(" ", 1, 0)] if described["add_prefix_space"] else []
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    else:
        name = described["pre_tokenizer_type"]
        pairs = [tuple(merge.split(" ")) for merge in described["merges"]]
        made = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=name in _WHOLE_WORDS_FIRST))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in _GPT2_SPLIT)
        made.pre_tokenizer = byte_level
        if name not in _GPT2_SPLIT:
            split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated")
            made.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        made.decoder = decoders.ByteLevel()
    kinds = described["token_type"]
    made.add_special_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == _CONTROL]
    )
    made.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == _USER_DEFINED])
    return made


def _described(header: GgufHeader, vocabulary: int) -> dict[str, Any]:
    """The vocabulary as transformers' converter takes it, checked."""
    kind = header.text("tokenizer.ggml.model")
    if kind not in ("llama", "gpt2"):
        raise CheckpointError(f"{header.path}: a {kind!r} tokenizer; edgec reads llama (SentencePiece) and gpt2 (BPE)")
    tokens = header.strings("tokenizer.ggml.tokens")
    if len(tokens) != vocabulary:
        raise CheckpointError(
            f"{header.path}: {len(tokens)} tokens, but token_embd.weight has {vocabulary} rows; "
            "the vocabulary is not this model's"
        )
    if longest := next((t for t in tokens if len(t) > limits.MAX_TOKEN_CHARACTERS), None):
        raise CheckpointError(f"{header.path}: a token of {len(longest)} characters ({longest[:20]!r}…)")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{header.path}: {len(tokens) - len(set(tokens))} tokens are there twice")
    found: dict[str, Any] = {"tokenizer_type": kind, "tokens": tokens, "token_type": [1] * len(tokens)}
    for key, name in (("scores", "scores"), ("token_type", "token_type")):
        if f"tokenizer.ggml.{key}" in header.metadata:
            values = header.numbers(f"tokenizer.ggml.{key}")
            if len(values) != len(tokens):
                raise CheckpointError(f"{header.path}: {len(values)} of tokenizer.ggml.{key} for {len(tokens)} tokens")
            found[name] = values.tolist()
    if kind == "llama" and "scores" not in found:
        raise CheckpointError(f"{header.path}: a SentencePiece vocabulary without tokenizer.ggml.scores")
    if kind == "gpt2":
        found["merges"] = _merges(header, set(tokens))
        found["pre_tokenizer_type"] = header.text("tokenizer.ggml.pre", "default")
        if found["pre_tokenizer_type"] not in _GPT2_SPLIT | GGUF_PRE_TOKENIZER_SPLITS.keys():
            raise CheckpointError(f"{header.path}: unknown pre-tokenizer {found['pre_tokenizer_type']!r}")
    found["add_prefix_space"] = header.flag("tokenizer.ggml.add_space_prefix", True)
    return found


def _merges(header: GgufHeader, tokens: set[str]) -> list[str]:
    """Checked before the Rust library sees them: it panics on some."""
    merges = header.strings("tokenizer.ggml.merges")
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right or not {left, right, left + right} <= tokens:
            raise CheckpointError(f"{header.path}: merge {merge[:40]!r} is not of two tokens that make a third")
    return merges


def _id(header: GgufHeader, name: str, vocabulary: int) -> int | None:
    key = f"tokenizer.ggml.{name}"
    return header.integer(key, high=vocabulary - 1) if key in header.metadata else None


def _framing(first: str | None, last: str | None, tokens: list[str]) -> Any:
    """What llama.cpp puts around a text."""
    around = [token for token in (first, last) if token is not None]
    template = ([first] if first is not None else []) + ["$A"] + ([last] if last is not None else [])
    return processors.TemplateProcessing(
        single=template, pair=[*template, "$B"], special_tokens=[(t, tokens.index(t)) for t in around]
    )


def _compare(header: GgufHeader, made: Any, *, begins: bool, ends: bool) -> None:
    told = run(
        [sys.executable, "-P", Path(__file__).with_name("probe.py"), header.path.absolute()],
        stdin=json.dumps(PROBES).encode(),
        timeout_s=limits.PROBE_TIMEOUT_S,
    )
    if told.returncode == _MISSING:
        logger.warning(
            "%s: its tokenizer was not compared with llama.cpp's, which is not installed (pip install 'edgec[gguf]')",
            header.path,
        )
        return
    if not told.ok:
        raise CheckpointError(f"{header.path}: llama.cpp cannot read its vocabulary ({told.reason()})")
    theirs = json.loads(told.stdout.splitlines()[-1])
    for text, expected in zip(PROBES, theirs, strict=True):
        ours = made.encode(text, add_special_tokens=False)
        if ours != expected:
            raise CheckpointError(
                f"{header.path}: its tokenizer cannot be rebuilt: llama.cpp splits {text[:40]!r} into {expected[:12]}, "
                f"the rebuilt one into {ours[:12]}. Give the transformers folder instead"
            )
