"""Sentence encoders on onnxruntime: model.onnx, tokenizer.json and config.json, nothing else.

The tokenizer is the `tokenizers` library on tokenizer.json, because it is what a device has; the same text must
give the same ids as in training, so padding and truncation are set here and not left to what the file happens to say
(all-MiniLM-L6-v2's own tokenizer.json pads everything to 128 tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.errors import CheckpointError, NumericsError, RuntimeUnavailableError
from edgec.runtime.interfaces import ENCODER, Floats
from edgec.runtime.layout import inside, optional_json, read_json
from edgec.runtime.memory import return_unused
from edgec.runtime.options import RuntimeOptions, import_onnxruntime, open_session, refuse_kv_cache

PLUGIN = True
SENTENCE_OUTPUT = "sentence_embedding"
HIDDEN_OUTPUT = "last_hidden_state"
_DEFAULT_MAX_TOKENS = 512
_SANE_MAX_TOKENS = 1 << 20
# These count positions from the padding id, so their table holds pad_token_id + 1 more rows than usable positions.
_OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet", "longformer"})


def claims(folder: Path) -> bool:
    return (folder / "model.onnx").is_file() and not (folder / "genai_config.json").exists()


def prepare() -> dict[str, str]:
    tokenizers = _import_tokenizers()
    return {"onnxruntime": str(import_onnxruntime().__version__), "tokenizers": str(tokenizers.__version__)}


def load(folder: Path, options: RuntimeOptions) -> OrtEncoder:
    return OrtEncoder(folder, options)


class OrtEncoder:
    """An encoder session with its tokenizer."""

    task = ENCODER
    runtime = "onnxruntime"

    def __init__(self, folder: Path | str, options: RuntimeOptions | None = None) -> None:
        """Loads `folder`. Raises CheckpointError for missing or contradicting files, RuntimeUnavailableError."""
        refuse_kv_cache(options, self.runtime)
        self.folder = Path(folder)
        config_path = self.folder / "config.json"
        self.config = read_json(config_path)
        self.max_tokens = max_tokens(self.folder, self.config)
        self._tokenizer = _tokenizer(self.folder, self.config, self.max_tokens)
        model = inside(self.folder, "model.onnx", config_path)
        self.session = open_session(model, options or RuntimeOptions())
        return_unused()
        self._inputs = {i.name: np.int32 if "int32" in i.type else np.int64 for i in self.session.get_inputs()}
        known = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
        if unknown := sorted(set(self._inputs) - known):
            raise CheckpointError(f"{model} wants the inputs {', '.join(unknown)}; an encoder has only {sorted(known)}")
        outputs = [o.name for o in self.session.get_outputs()]
        self.output = next((name for name in (SENTENCE_OUTPUT, HIDDEN_OUTPUT) if name in outputs), "")
        if not self.output:
            raise CheckpointError(f"{model} has the outputs {outputs}; expected {SENTENCE_OUTPUT} or {HIDDEN_OUTPUT}")

    def tokenize(self, sentences: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """N sentences → input_ids, attention_mask, token_type_ids, each [N, longest], padded on the right."""
        encoded = self._tokenizer.encode_batch(list(sentences))
        return {
            "input_ids": np.array([e.ids for e in encoded], dtype=np.int64),
            "attention_mask": np.array([e.attention_mask for e in encoded], dtype=np.int64),
            "token_type_ids": np.array([e.type_ids for e in encoded], dtype=np.int64),
        }

    def token_count(self, sentences: Sequence[str]) -> int:
        return sum(sum(e.attention_mask) for e in self._tokenizer.encode_batch(list(sentences)))

    def forward(self, tokens: dict[str, NDArray[np.int64]]) -> Floats:
        """Tokens as `tokenize` gives them, each [N, T] → embeddings [N, d] float32, as the graph pools them."""
        mask = tokens["attention_mask"]
        feeds: dict[str, NDArray[Any]] = {k: tokens[k].astype(t) for k, t in self._inputs.items() if k in tokens}
        if "position_ids" in self._inputs:
            positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
            feeds["position_ids"] = positions.astype(self._inputs["position_ids"])
        (value,) = self.session.run([self.output], feeds)
        result = np.asarray(value, dtype=np.float32)
        if self.output == HIDDEN_OUTPUT:
            weight = mask[..., None].astype(np.float32)
            result = (result * weight).sum(axis=1) / np.maximum(weight.sum(axis=1), 1.0)
        return result

    def embed(self, sentences: Sequence[str], batch_size: int = 32) -> Floats:
        """N sentences → [N, d] float32, in their order. Batches are formed by length, so that little is padding.

        Raises NumericsError when the model answers NaN or Inf.
        """
        if not sentences:
            return np.zeros((0, int(self.config.get("hidden_size", 0))), dtype=np.float32)
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        result: Floats | None = None
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            values = self.forward(self.tokenize([sentences[i] for i in rows]))
            if not np.isfinite(values).all():
                raise NumericsError(f"{self.folder / 'model.onnx'} answered NaN or Inf for ordinary text")
            if result is None:
                result = np.zeros((len(sentences), values.shape[1]), dtype=np.float32)
            result[rows] = values
        assert result is not None
        return result


def max_tokens(folder: Path, config: dict[str, Any]) -> int:
    """The longest input [tokens]: what sentence-transformers uses when it says so, else the smallest known limit."""
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and str(config.get("model_type")) in _OFFSET_POSITIONS:
        positions -= (_token_id(config.get("pad_token_id")) or 0) + 1
    stated = optional_json(folder / "sentence_bert_config.json").get("max_seq_length")
    model = optional_json(folder / "tokenizer_config.json").get("model_max_length")
    found = [n for n in (stated, model, positions) if isinstance(n, int) and 0 < n < _SANE_MAX_TOKENS]
    return min(found, default=_DEFAULT_MAX_TOKENS)


def _token_id(value: Any) -> int | None:
    """One that the tokenizers library can take, else None."""
    return value if isinstance(value, int) and 0 <= value < 1 << 32 else None


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of an encoder's folder as `OrtEncoder` uses it, without a session. Raises CheckpointError."""
    config = read_json(folder / "config.json")
    return _tokenizer(folder, config, max_tokens(folder, config))


def _tokenizer(folder: Path, config: dict[str, Any], max_tokens: int) -> Any:
    """tokenizer.json, padding and truncating on the right."""
    path = folder / "tokenizer.json"
    read_json(path)  # size, existence and shape, with our own message
    try:
        tokenizer = _import_tokenizers().Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error
    stated = tokenizer.padding or {}
    pad_id = _token_id(stated.get("pad_id", config.get("pad_token_id"))) or 0
    tokenizer.enable_padding(direction="right", pad_id=pad_id, pad_token=tokenizer.id_to_token(pad_id) or "[PAD]")
    tokenizer.enable_truncation(max_length=max_tokens, direction="right")
    return tokenizer


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise RuntimeUnavailableError(f"tokenizers cannot be imported ({error}); pip install tokenizers") from error
    return tokenizers
