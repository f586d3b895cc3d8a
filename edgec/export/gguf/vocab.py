"""The tokenizer of a model inside its GGUF file, proven by encoding text with both.

transformers' own tokenizer is the one source: it reads `tokenizer.json`, or makes the same of a SentencePiece
`tokenizer.model`. llama.cpp knows two kinds that these models use: "llama" (SentencePiece's BPE with bytes to fall back
on) and "gpt2" (byte-level BPE), and for the latter a list of built-in pre-tokenizers, by name. A converter that picks
the name by a hash of known models is wrong for every other model without saying so (llama.cpp #7476), so here a name
counts only if llama.cpp, reading the vocabulary that is to ship, splits a page of awkward text exactly as
transformers does. A model for which no name does is refused.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgec.errors import CheckpointError, UnsupportedModelError
from edgec.export.gguf.metadata import Value
from edgec.export.gguf.writer import write_gguf
from edgec.runtime.llama_cpp import Vocabulary

logger = logging.getLogger(__name__)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""`llama_token_type`."""

_PRE_TOKENIZERS = ("llama-bpe", "qwen2", "gpt-2", "smollm", "tekken", "gpt-4o", "deepseek-llm", "refact", "default")
"""Names of llama.cpp's pre-tokenizers that are tried, after the one that the tokenizer's own pattern suggests."""

_PATTERNS = (
    ("\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|", "llama-bpe"),
    ("\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|", "qwen2"),
    ("\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+|", "tekken"),
    ('"Digits"', "smollm"),
)
"""A piece of a tokenizer's pattern → the pre-tokenizer to try first."""

PROBES = (
    "Hello world! This is a test, isn't it? I've DON'T we'll you're 'tis.",
    'def f(x):\n    return x**2  # comment\n\n\n\tif a != b:\r\n\t\tprint("%d" % 42)\n',
    "3 33 333 3333 33333 3.14 1,000,000 2024-01-31 0xFF 1e-5",
    "  two spaces,   three,    four\n \n  \n\n   and lines \t tabs\t\t",
    "Größe naïve café Über straße, Привет мир, Ελληνικά",
    "你好，世界。日本語のテキスト 한국어 عربى हिन्दी",
    "emoji 🙂🚀 and symbols ©®™ … — “quotes” «guillemets» ½ × ÷ ≤",
    "CamelCase snake_case kebab-case HTTPServer2 a.b.c(d)[e]{f} <tag attr='x'/> https://example.org/?q=1&r=2",
    "word",
    " leading space",
    "trailing space ",
)
"""Text on which two tokenizers that are not the same rarely agree."""


def vocabulary(tokenizer: Any, rows: int, ends: Sequence[int] = ()) -> dict[str, Value]:
    """Metadata under `tokenizer.*`, verified. Raises UnsupportedModelError or CheckpointError.

    tokenizer: as transformers loads it. rows: of the embedding table; a file has one token for each. ends: further
    tokens that end a text, from the generation config.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError("this tokenizer has no tokenizers backend; save it with a tokenizer.json")
    record = json.loads(backend.to_str())
    body = record["model"]
    if body.get("type") != "BPE":
        raise UnsupportedModelError(f"a {body.get('type')} tokenizer; edgec writes BPE tokenizers to GGUF")
    names = _by_id(record, rows)
    shared = {**_special(tokenizer, rows, ends), **_template(tokenizer)}
    kinds = _spm(record, names) if body.get("byte_fallback") else _byte_level(record, names)
    differing = ""
    for found in kinds:
        candidate = {**found, **shared}
        differing = _difference(tokenizer, candidate, rows)
        if not differing:
            return candidate
    raise UnsupportedModelError(
        f"none of llama.cpp's tokenizers splits text as this model's does (for one, {differing!r}); a file with "
        "another tokenization would be silently worse. Use an ONNX target"
    )


def no_vocabulary() -> dict[str, Value]:
    """For models without a tokenizer: the file takes and gives token ids."""
    return {"tokenizer.ggml.model": "none"}


def _by_id(record: Mapping[str, Any], rows: int) -> list[tuple[str, int]]:
    """(token, type) of every row. Rows that the tokenizer never gives are marked unused."""
    found = [(f"[PAD{i}]", _UNUSED) for i in range(rows)]
    model = record["model"]
    added = {entry["id"]: entry for entry in record.get("added_tokens", [])}
    if beyond := [i for i in [*model["vocab"].values(), *added] if not 0 <= i < rows]:
        raise CheckpointError(f"the tokenizer gives token {max(beyond)}, and the embedding table has {rows} rows")
    for token, i in model["vocab"].items():
        kind = _BYTE if model.get("byte_fallback") and _is_byte(token) else _NORMAL
        found[i] = (token, _UNKNOWN if token == model.get("unk_token") else kind)
    for i, entry in added.items():
        if found[i][1] != _UNKNOWN:
            found[i] = (entry["content"], _CONTROL if entry["special"] else _USER_DEFINED)
    return found


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _spm(record: Mapping[str, Any], names: Sequence[tuple[str, int]]) -> Iterator[dict[str, Value]]:
    """SentencePiece's BPE. llama.cpp merges the pair whose result scores best: here minus the rank of its merge."""
    made: dict[str, int] = {}
    for rank, merge in enumerate(record["model"]["merges"]):
        left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
        made.setdefault(left + right, rank)
    if len({token for token, kind in names if kind == _BYTE}) < 256:
        return  # llama.cpp looks every byte up, and ends the process where one is missing
    scores = [0.0 if kind != _NORMAL else -float(made.get(token, len(made))) for token, kind in names]
    text = json.dumps([record.get("normalizer"), record.get("pre_tokenizer")])
    prefix = '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
    values: dict[str, Value] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [token for token, _ in names],
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [kind for _, kind in names],
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    yield values


def _byte_level(record: Mapping[str, Any], names: Sequence[tuple[str, int]]) -> Iterator[dict[str, Value]]:
    """Byte-level BPE under every name that may fit, the likeliest first."""
    merges = [m if isinstance(m, str) else " ".join(m) for m in record["model"]["merges"]]
    pattern = json.dumps(record.get("pre_tokenizer")).replace("\\\\", "\\")
    likely = [name for piece, name in _PATTERNS if piece in pattern] or ["gpt-2"]
    for name in dict.fromkeys([*likely, *_PRE_TOKENIZERS]):
        yield {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name,
            "tokenizer.ggml.tokens": [token for token, _ in names],
            "tokenizer.ggml.token_type": [kind for _, kind in names],
            "tokenizer.ggml.merges": merges
            or [""],  # llama.cpp wants the list; an entry without a blank merges nothing
        }


def _special(tokenizer: Any, rows: int, ends: Sequence[int]) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for key, attribute in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = getattr(tokenizer, f"{attribute}_token_id", None)
        if number is not None and 0 <= int(number) < rows:
            values[f"tokenizer.ggml.{key}_token_id"] = int(number)
    eos = tokenizer.eos_token_id
    if eos is None and ends:
        eos = values["tokenizer.ggml.eos_token_id"] = int(ends[0])
    if others := [int(e) for e in ends if e != eos and 0 <= e < rows]:
        values["tokenizer.ggml.eot_token_id"] = others[0]
    ids = list(tokenizer("a")["input_ids"])
    values["tokenizer.ggml.add_bos_token"] = bool(ids) and ids[0] == tokenizer.bos_token_id
    values["tokenizer.ggml.add_eos_token"] = bool(ids) and ids[-1] == tokenizer.eos_token_id
    return values


def _template(tokenizer: Any) -> dict[str, Value]:
    """The chat template; of several, the default one, since llama.cpp picks by that key."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), None)
    return {"tokenizer.chat_template": template} if isinstance(template, str) and template else {}


def _difference(tokenizer: Any, values: Mapping[str, Value], rows: int) -> str:
    """The first probe that llama.cpp, with this vocabulary, splits in another way; "" when it splits all alike."""
    header: dict[str, Value] = {"general.architecture": "llama", "general.type": "model", "llama.vocab_size": rows}
    with tempfile.TemporaryDirectory(prefix="edgec-vocabulary-") as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_gguf(path, {**header, **values}, [])
        try:
            found = Vocabulary(path)
        except CheckpointError as error:
            logger.info("llama.cpp refuses the vocabulary as %s: %s", values.get("tokenizer.ggml.pre"), error)
            return PROBES[0]
        return next((text for text in PROBES if found.encode(text) != list(tokenizer(text)["input_ids"])), "")
