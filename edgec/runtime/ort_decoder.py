"""Causal LMs on plain onnxruntime, with the KV cache fed by hand: for evaluation, not for speed.

onnxruntime-genai gives the text; this gives the logits of every position in bounded memory (chunks of the text,
each continuing the cache of the one before), also where genai is not installed (an emulated device) or refuses the
model. It is no loader plugin: the same folder opens in genai by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.errors import CheckpointError, NumericsError, UsageError
from edgec.runtime.interfaces import CAUSAL_LM, Floats, Ids
from edgec.runtime.layout import FIRST_LOGITS, inside, read_json, whole_number
from edgec.runtime.options import RuntimeOptions, import_onnxruntime, open_session, refuse_kv_cache

_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
}


@dataclass(frozen=True)
class CacheTensor:
    """One cache tensor: the graph's input and output names and its shape [1, heads, past, size]."""

    past: str
    present: str
    heads: int
    size: int
    dtype: Any


class OrtDecoder:
    """A decoder session. `logits` is the work; `greedy` exists so that parity can be read as text."""

    task = CAUSAL_LM
    runtime = "onnxruntime"

    def __init__(self, folder: Path | str, options: RuntimeOptions | None = None) -> None:
        """Loads a folder with genai_config.json. Raises CheckpointError, RuntimeUnavailableError."""
        refuse_kv_cache(options, self.runtime)
        self.folder = Path(folder)
        path = self.folder / "genai_config.json"
        model = read_json(path).get("model")
        decoder = model.get("decoder") if isinstance(model, dict) else None
        if not isinstance(model, dict) or not isinstance(decoder, dict):
            raise CheckpointError(f"{path} has no model.decoder; it is not a decoder that edgec can run")
        self.vocab_size = whole_number(model, "vocab_size", path)
        self.context_length = whole_number(model, "context_length", path)
        self.path = file = inside(self.folder, decoder.get("filename", "model.onnx"), path)
        self._ort = import_onnxruntime()
        self.session = open_session(file, options or RuntimeOptions())
        self._types = {i.name: _DTYPES.get(i.type) for i in self.session.get_inputs()}
        parts = [decoder.get(part) or {} for part in ("inputs", "outputs")]
        if not all(isinstance(part, dict) for part in parts):
            raise CheckpointError(f"{path}: inputs and outputs of model.decoder must be names by role")
        self._names = {role: str(name) for part in parts for role, name in part.items()}
        self._logits = self._names.get("logits", "logits")
        selects = any(i.name == FIRST_LOGITS for i in self.session.get_overridable_initializers())
        zero = self._ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.int64))
        self._every_position = {FIRST_LOGITS: zero} if selects else {}
        self.caches = self._find_caches(decoder, path)
        plain = {self._names.get(n, n) for n in ("input_ids", "attention_mask", "position_ids")}
        if unknown := sorted(set(self._types) - plain - {c.past for c in self.caches}):
            raise CheckpointError(f"{file} wants inputs that edgec does not know: {', '.join(unknown[:4])}")

    def _find_caches(self, decoder: dict[str, Any], path: Path) -> tuple[CacheTensor, ...]:
        layers = whole_number(decoder, "num_hidden_layers", path, high=4096)
        heads = whole_number(decoder, "num_key_value_heads", path)
        size = whole_number(decoder, "head_size", path)
        found = []
        for kind in ("key", "value"):
            past = self._names.get(f"past_{kind}_names", f"past_key_values.%d.{kind}")
            present = self._names.get(f"present_{kind}_names", f"present.%d.{kind}")
            for layer in range(layers):
                name = past.replace("%d", str(layer))
                if self._types.get(name) is None:
                    raise CheckpointError(f"{path} names the cache input {name!r}, which the graph does not have")
                found.append(CacheTensor(name, present.replace("%d", str(layer)), heads, size, self._types[name]))
        return tuple(found)

    def logits(self, ids: Ids, chunk: int = 128) -> Floats:
        """Token ids [1, T] or [T] → logits [T, V] float32; `chunk` tokens are executed at a time."""
        parts = list(self.logits_chunks(ids, chunk))
        return np.concatenate(parts, axis=0)

    def logits_chunks(self, ids: Ids, chunk: int = 128) -> Iterator[Floats]:
        """The same as an iterator of [≤ chunk, V], for vocabularies whose full [T, V] would not fit in memory.

        A graph of other tools whose head sees the last position only is run a token at a time.
        """
        flat = self._checked(ids)
        if chunk < 1:
            raise UsageError(f"chunk must be at least 1 token, got {chunk}")
        cache, start = self._empty_cache(), 0
        while start < len(flat):
            values, grown = self._step(flat[start : start + chunk], start, cache)
            if len(values) == 1 < len(flat[start : start + chunk]):
                chunk = 1
                continue
            yield values
            start, cache = start + len(values), grown

    def greedy(self, ids: Ids, new_tokens: int) -> list[int]:
        """The `new_tokens` most likely tokens after `ids`, one at a time; the end of text is not special."""
        flat = self._checked(ids, new_tokens)
        values, cache = self._step(flat, 0, self._empty_cache())
        result = [int(values[-1].argmax())]
        while len(result) < new_tokens:
            step = np.array(result[-1:], dtype=np.int64)
            values, cache = self._step(step, len(flat) + len(result) - 1, cache)
            result.append(int(values[-1].argmax()))
        return result

    def cache_peaks(self, ids: Ids) -> dict[str, NDArray[np.float32]]:
        """The largest absolute key and value of every head and channel over a text: cache input → [heads, head_dim]."""
        _, cache = self._step(self._checked(ids), 0, self._empty_cache())
        return {name: np.abs(value.numpy().astype(np.float32)).max(axis=(0, 2)) for name, value in cache.items()}

    def _empty_cache(self) -> dict[str, Any]:
        make = self._ort.OrtValue.ortvalue_from_numpy
        return {c.past: make(np.zeros((1, c.heads, 0, c.size), dtype=c.dtype)) for c in self.caches}

    def _step(self, ids: Ids, past: int, cache: dict[str, Any]) -> tuple[Floats, dict[str, Any]]:
        """ids [t] after `past` cached positions → logits and the cache of past + t positions.

        Logits are [t, V], or [1, V], the last position's, where the graph can give no others.
        """
        plain: dict[str, NDArray[Any]] = {
            "input_ids": ids[None, :],
            "attention_mask": np.ones((1, past + len(ids)), dtype=np.int64),
            "position_ids": np.arange(past, past + len(ids), dtype=np.int64)[None, :],
        }
        feeds = {**cache, **self._every_position}
        for key, value in plain.items():
            name = self._names.get(key, key)
            if name in self._types:
                dtype = self._types[name] or np.int64
                feeds[name] = self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value, dtype=dtype))
        outputs = self.session.run_with_ort_values([self._logits, *(c.present for c in self.caches)], feeds)
        values = np.asarray(outputs[0].numpy(), dtype=np.float32)[0]
        if values.shape[0] not in (1, len(ids)):
            raise CheckpointError(f"{self.folder} returns logits of {values.shape[0]} of {len(ids)} positions")
        if not np.isfinite(values).all():
            raise NumericsError(f"{self.folder} answered NaN or Inf at position {past} or later")
        return values, {c.past: value for c, value in zip(self.caches, outputs[1:], strict=True)}

    def _checked(self, ids: Ids, new_tokens: int = 0) -> Ids:
        flat = np.asarray(ids, dtype=np.int64).reshape(-1)
        if not len(flat):
            raise UsageError("no token ids; give at least one")
        if len(flat) + new_tokens > self.context_length:
            raise UsageError(f"{len(flat) + new_tokens} tokens do not fit the context of {self.context_length}")
        if flat.min() < 0 or flat.max() >= self.vocab_size:
            raise UsageError(f"a token id lies outside the vocabulary of {self.vocab_size}")
        return flat
