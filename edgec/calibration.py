"""Text for calibrating, healing, searching and validating: four disjoint splits, by hash, of one source.

The default source is `pydoc_data.topics`: half a megabyte of English technical prose that ships with every
Python, so that a default needs neither network nor committed data. Causal LMs add text sampled from the dense
model itself, which is the distribution that their divergence is measured on. A user's own `--calibration FILE`
replaces both.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from edgec import limits
from edgec.checkpoint import Checkpoint, parse_json
from edgec.errors import CalibrationError, CheckpointError
from edgec.modeling import ENCODER_TASK, quiet_transformers

SPLITS = ("calibrate", "heal", "search", "validate")
_SHARES = (0.6, 0.1, 0.1)  # the rest validates. Healing learns from the first two; plans are compared on the third.

ENCODER_LENGTH = 128
"""Longest sentence an encoder is calibrated on [tokens]."""
DECODER_LENGTH = 256
"""Window a causal LM is calibrated on [tokens]."""
_PASSAGE = 16
"""Length of a passage, per token of a window [characters]: about four windows."""
_GOLDEN = (5**0.5 - 1) / 2
BATCH_TOKENS = 4096
"""Tokens per forward pass: bounds the memory of activations [tokens]."""


@dataclass(frozen=True)
class Text:
    """Items of text in a stable order. origin: what a report prints."""

    origin: str
    items: tuple[str, ...]

    def split(self, name: str) -> Text:
        """One of SPLITS: an item's SHA-256 decides, so adding text never moves an item from one split to another."""
        low = sum(_SHARES[: SPLITS.index(name)])
        high = low + (_SHARES[SPLITS.index(name)] if name != "validate" else 1.0)
        chosen = tuple(t for t in self.items if low <= _place(t) < high)
        return Text(f"{self.origin}, {name} split", chosen)


def _place(item: str) -> float:
    return int.from_bytes(hashlib.sha256(item.encode()).digest()[:6], "big") / (1 << 48)


def load_text(file: Path | None = None) -> Text:
    """A .txt file (paragraphs, or lines where there are no blank lines) or .jsonl file (strings, or objects with
    "text"); without one, the default text. Raises CalibrationError.
    """
    if file is None:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
        paragraphs = (p for name in sorted(topics) for p in topics[name].split("\n\n"))
        return Text("pydoc_data.topics", _clean(paragraphs))
    content = read_utf8(file)
    if file.suffix == ".jsonl":
        return Text(file.name, tuple(text for _, text in json_lines(file, content, "text") if text.strip()))
    blank_lines = "\n\n" in content
    return Text(file.name, _clean(content.split("\n\n" if blank_lines else "\n"), keep_lines=True))


def read_utf8(file: Path) -> str:
    """A text file of at most MAX_CALIBRATION_BYTES, its line ends "\\n". Raises CalibrationError."""
    try:
        with file.open("rb") as stream:  # a pipe has no size, so the cap is on what is read
            raw = stream.read(limits.MAX_CALIBRATION_BYTES + 1)
        if len(raw) > limits.MAX_CALIBRATION_BYTES:
            raise CalibrationError(
                f"{file}: larger than {limits.MAX_CALIBRATION_BYTES // 1_000_000} MB; a sample is enough"
            )
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise CalibrationError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CalibrationError(f"{file}:{line}: not UTF-8 (byte {error.start})") from error


def json_lines(file: Path, content: str, *keys: str) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not empty: a JSON string, or the first of `keys` that an object has.

    Raises CalibrationError naming the line.
    """
    for number, line in enumerate(content.split("\n"), start=1):  # splitlines would cut strings at U+2028
        if not line.strip():
            continue
        try:
            entry = parse_json(line, f"{file}:{number}")
        except CheckpointError as error:
            raise CalibrationError(f"{error}; expected one JSON value per line") from error
        text = next((entry[key] for key in keys if key in entry), None) if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            wanted = " or ".join(f'"{key}"' for key in keys)
            raise CalibrationError(f"{file}:{number}: expected a string or an object with {wanted}")
        yield number, text.encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair


def _clean(items: Any, keep_lines: bool = False) -> tuple[str, ...]:
    tidy = (item.strip("\n") if keep_lines else re.sub(r"\s+", " ", item).strip() for item in items)
    return tuple(dict.fromkeys(item for item in tidy if len(item.strip()) >= 20 or (keep_lines and item.strip())))


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The folder's own tokenizer, from its JSON files; remote code is never run. Raises CheckpointError."""
    try:
        with quiet_transformers():
            return transformers.AutoTokenizer.from_pretrained(
                checkpoint.folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # tokenizers raises plain Exceptions
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{checkpoint.folder}: no tokenizer that loads from its JSON files ({reason})") from error


@dataclass(frozen=True)
class Batches:
    """Token batches: each a dict of int64 tensors input_ids and attention_mask [B, T]."""

    origin: str
    items: tuple[dict[str, Tensor], ...]

    @property
    def tokens(self) -> int:
        return int(sum(int(b["attention_mask"].sum()) for b in self.items))

    def reads(self, rows: int) -> NDArray[np.float64]:
        """The share of all tokens that each row of a table of so many rows is read by [rows]."""
        ids = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in self.items])
        return np.asarray(np.bincount(ids.numpy(), minlength=rows) / max(1, len(ids)))


def tokenize(
    text: Text,
    tokenizer: Any,
    task: str,
    max_tokens: int,
    *,
    context: int = limits.MAX_DIMENSION,
    minimum: int = limits.MIN_CALIBRATION_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
) -> Batches:
    """Encoders: items padded into batches of similar length. Causal LMs: items joined and cut into windows.

    At most about max_tokens tokens from all over the text, in rows of at most `context`, the longest that the model
    takes. Raises CalibrationError when fewer than `minimum` come out.
    """
    if task == ENCODER_TASK:
        ids = _encoder_ids(text, tokenizer, max_tokens, min(ENCODER_LENGTH, context))
    else:
        ids = _windows(text, tokenizer, max_tokens, min(DECODER_LENGTH, context))
    batches = Batches(text.origin, tuple(pad(group) for group in _grouped(ids, batch_tokens)))
    if batches.tokens < minimum:
        raise CalibrationError(
            f"{text.origin}: {batches.tokens} tokens; at least {minimum} are needed for statistics that mean "
            "something. Give more text with --calibration"
        )
    return batches


def _encoder_ids(text: Text, tokenizer: Any, max_tokens: int, length: int) -> list[list[int]]:
    def ids_of(item: str) -> list[int]:
        ids: list[int] = tokenizer(item, truncation=True, max_length=length)["input_ids"]
        return ids

    return sorted((ids for ids in _taken(text.items, ids_of, max_tokens) if ids), key=len)


def _windows(text: Text, tokenizer: Any, max_tokens: int, length: int) -> list[list[int]]:
    def ids_of(passage: str) -> list[int]:
        ids: list[int] = tokenizer(passage)["input_ids"]
        return ids

    stream = [token for ids in _taken(_passages(text.items, _PASSAGE * length), ids_of, max_tokens) for token in ids]
    full = min(len(stream), max(max_tokens, length)) // length
    windows = [stream[i * length : (i + 1) * length] for i in range(full)]
    return windows or ([stream] if stream else [])


def _passages(items: Sequence[str], characters: int) -> list[str]:
    """Neighbouring items joined: a window should read as the text was written, not as scraps from all over it."""
    passages: list[str] = []
    open_length = characters
    for item in items:
        if open_length >= characters:
            passages.append("")
            open_length = 0
        passages[-1] += item + "\n\n"
        open_length += len(item)
    return passages


def _taken(items: Sequence[str], ids_of: Callable[[str], list[int]], max_tokens: int) -> list[list[int]]:
    """Token ids of as many items as give max_tokens, evenly from all over the text, in its order: the first pages of a
    file, or its first genre, say little about the rest.
    """
    taken: dict[int, list[int]] = {}
    total = 0
    # Multiples of the golden ratio, modulo 1, below any bound lie at nearly even distances (the three-gap theorem).
    for place in sorted(range(len(items)), key=lambda i: i * _GOLDEN % 1):
        taken[place] = ids_of(items[place])
        total += len(taken[place])
        if total >= max_tokens:
            break
    return [taken[place] for place in sorted(taken)]


def _grouped(ids: list[list[int]], batch_tokens: int) -> list[list[list[int]]]:
    groups: list[list[list[int]]] = []
    for row in ids:
        if not groups or (len(groups[-1]) + 1) * max(len(row), len(groups[-1][0])) > batch_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def pad(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Rows of token ids → input_ids and attention_mask [B, T], padded on the right with id 0 (masked)."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def self_sampled(
    model: transformers.PreTrainedModel, tokens: int, seed: int = 0, batch_tokens: int = BATCH_TOKENS
) -> Batches:
    """Windows int64 [B, DECODER_LENGTH] drawn from the causal LM itself at temperature 1, from its BOS (or 0) on."""
    length = min(DECODER_LENGTH, int(getattr(model.config, "max_position_embeddings", DECODER_LENGTH)))
    rows = max(1, tokens // length)
    start = getattr(model.config, "bos_token_id", None) or 0
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((rows, 1), int(start), dtype=torch.int64)
    cache, step = None, ids
    with torch.no_grad():
        while ids.shape[1] < length:
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            step = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, step], dim=1)
    per_batch = max(1, batch_tokens // length)
    items = tuple({"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(per_batch))
    return Batches("text sampled from the dense model", items)
