"""A checkpoint in torch itself, eager or through `torch.compile`: what most people would run without a toolchain; and
what `edgec compress` wrote, its layers factored in torch, which is how the plan runs where no other runtime does.

`peer.json`: {"loader": "torch_models", "checkpoint": folder, "compile": bool, "dtype": one of `DTYPES`}. The
checkpoint is read as everywhere in edgec: safetensors only, no remote code. A causal LM is compiled as transformers
advises: a static cache, decode steps compiled and the prefill left eager, because its length varies. A compressed
folder computes in float32, on a GPU in float16: its cores are unpacked, so it has their shapes and not their bytes.

On a GPU every answer is read back before its time is taken, which waits for all that was launched.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from edgec.bench.jobs import PEER_FILE, Job
from edgec.calibration import load_tokenizer
from edgec.checkpoint import Checkpoint, open_checkpoint
from edgec.compress.store import load as load_compressed
from edgec.errors import CheckpointError, NumericsError, RuntimeUnavailableError
from edgec.evaluate.embeddings import embed_batch, torch_embedder
from edgec.modeling import ENCODER_TASK, load_dense, task_of
from edgec.pooling import Pooling, read_pooling
from edgec.runtime import ort_encoder
from edgec.runtime.interfaces import CAUSAL_LM, ENCODER, CausalLM, Encoder, Floats, Ids
from edgec.runtime.layout import is_compressed, read_json
from edgec.runtime.options import RuntimeOptions, refuse_kv_cache
from edgec.runtime.prompts import check_prompt

PLUGIN = True
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def claims(folder: Path) -> bool:
    return (folder / PEER_FILE).is_file() or is_compressed(folder)


def prepare() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


def load(folder: Path, options: RuntimeOptions) -> TorchEncoder | TorchCausalLM:
    """Raises CheckpointError for an unsound peer.json and for what cannot be read from its checkpoint,
    RuntimeUnavailableError for a GPU that torch does not have.
    """
    refuse_kv_cache(options, "torch")
    device = _device(options)
    torch.set_num_threads(options.thread_count())
    compiled = False
    if (folder / PEER_FILE).is_file():
        source, dtype, compiled = _told(folder / PEER_FILE)
        checkpoint = open_checkpoint(source)
        model: Any = load_dense(checkpoint, dtype)
    else:
        checkpoint = open_checkpoint(folder)
        model = load_compressed(folder)
        if options.gpu is not None:
            for parameter in model.parameters():  # not buffers: rotary frequencies need their bits
                parameter.data = parameter.data.to(torch.float16)
    kind = TorchEncoder if task_of(checkpoint) == ENCODER_TASK else TorchCausalLM
    return kind(folder, checkpoint, model.to(device), compiled=compiled)


def _told(path: Path) -> tuple[Path, torch.dtype, bool]:
    """Checkpoint, dtype and whether to compile, as a peer.json has them."""
    told = read_json(path)
    source, dtype = told.get("checkpoint"), DTYPES.get(str(told.get("dtype")))
    if not isinstance(source, str) or dtype is None or not isinstance(told.get("compile"), bool):
        raise CheckpointError(f"{path}: expected checkpoint, compile and dtype ({', '.join(DTYPES)}), got {told}")
    return Path(source), dtype, told["compile"]


def _device(options: RuntimeOptions) -> torch.device:
    if options.gpu is None:
        return torch.device("cpu")
    if not options.gpu < torch.cuda.device_count():
        raise RuntimeUnavailableError(
            f"torch has {torch.cuda.device_count()} CUDA GPUs and was asked for number {options.gpu}; install a torch "
            "built for CUDA, and check the driver (nvidia-smi)"
        )
    return torch.device("cuda", options.gpu)


def warm(model: Encoder | CausalLM, job: Job) -> None:
    """Compile for the shapes of the job what is to be compiled. Raises RuntimeUnavailableError where torch finds no C++
    compiler.
    """
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    if not getattr(model, "compiled", False):
        return
    try:
        if isinstance(model, TorchEncoder):
            for sentences in (job.sentences, job.sentences[:1], job.sentences[1:2]):
                model.embed(sentences, batch_size=max(1, len(sentences)))
        elif isinstance(model, TorchCausalLM):
            chosen = [i % model.vocab_size for i in range(job.prompt_tokens)]
            for _ in model.forced(chosen, min(job.new_tokens, 3), room=job.prompt_tokens + job.new_tokens):
                pass
    except (InvalidCxxCompiler, InductorError) as error:
        text = str(error).strip().splitlines()
        raise RuntimeUnavailableError(
            f"torch.compile cannot compile here ({text[0][:200] if text else type(error).__name__}); it needs a C++ "
            "compiler such as g++"
        ) from error


class TorchEncoder:
    """A sentence encoder, pooled as its folder says (mean, to unit length, where it says nothing)."""

    task = ENCODER
    runtime = "torch"

    def __init__(self, folder: Path, checkpoint: Checkpoint, model: Any, *, compiled: bool) -> None:
        self.folder = folder
        self.compiled = compiled
        # The number of tokens differs from batch to batch: one program for all of them.
        self._model: Any = _compiled(model, dynamic=True) if compiled else model
        self._tokenizer = load_tokenizer(checkpoint)
        self._pooling = read_pooling(checkpoint.folder) or Pooling("mean", normalize=True)
        self._max_tokens = ort_encoder.max_tokens(checkpoint.folder, dict(checkpoint.config))

    def embed(self, sentences: Sequence[str], batch_size: int = 32) -> Floats:
        if not sentences:
            return np.zeros((0, int(self._model.config.hidden_size)), np.float32)
        found = torch_embedder(
            self._model, self._tokenizer, self._pooling, max_tokens=self._max_tokens, batch=batch_size
        )(sentences)
        return _finite(found, self.folder)

    def forward(self, tokens: dict[str, NDArray[np.int64]]) -> Floats:
        """Tokens, each [N, T] → embeddings [N, d] float32."""
        given = {name: torch.from_numpy(values) for name, values in tokens.items() if name != "token_type_ids"}
        with torch.inference_mode():
            found: Floats = embed_batch(self._model, given, self._pooling).float().cpu().numpy()
        return _finite(found, self.folder)

    def token_count(self, sentences: Sequence[str]) -> int:
        encoded = self._tokenizer(list(sentences), truncation=True, max_length=self._max_tokens)
        return sum(len(ids) for ids in encoded["input_ids"])


class TorchCausalLM:
    """A causal LM with its cache. Only what a measurement asks for: forced tokens and logits."""

    task = CAUSAL_LM
    runtime = "torch"

    def __init__(self, folder: Path, checkpoint: Checkpoint, model: Any, *, compiled: bool) -> None:
        self.folder = folder
        self._model = model
        self._step: Any = _compiled(self._model, dynamic=False) if compiled else self._model
        self.compiled = compiled
        config = self._model.config
        self.vocab_size = int(config.vocab_size)
        self.context_length = int(config.max_position_embeddings)
        end = config.eos_token_id
        self.ends = [] if end is None else list(end) if isinstance(end, list | tuple) else [int(end)]
        self._cache: transformers.StaticCache | None = None
        self._room = 0

    def forced(self, ids: Sequence[int], new_tokens: int, *, room: int = 0) -> Iterator[int]:
        """Exactly `new_tokens` greedy tokens, end of text suppressed. room: positions of the cache of a compiled model,
        whose size is part of its program; 0 for just enough.
        """
        flat = [int(i) for i in ids]
        check_prompt(flat, new_tokens, self.context_length, self.vocab_size, least=1)
        with torch.inference_mode():
            cache = self._fresh_cache(max(room, len(flat) + new_tokens))
            token = self._likeliest(self._model(self._tokens(flat), past_key_values=cache, logits_to_keep=1))
        yield token
        for _ in range(new_tokens - 1):
            with torch.inference_mode():
                token = self._likeliest(self._step(self._tokens([token]), past_key_values=cache, logits_to_keep=1))
            yield token

    def logits(self, ids: Ids) -> Floats:
        """Token ids [1, T] or [T] → logits [T, V] float32."""
        with torch.inference_mode():
            found: Floats = self._model(self._tokens(ids)).logits[0].float().cpu().numpy()
        return _finite(found, self.folder)

    def _tokens(self, ids: Ids | Sequence[int]) -> torch.Tensor:
        """[1, T], where the model is."""
        return torch.as_tensor(np.asarray(ids).reshape(1, -1), device=self._model.device)

    def _likeliest(self, out: Any) -> int:
        values = out.logits[0, -1].float()
        values[self.ends] = -torch.inf
        return int(values.argmax())

    def _fresh_cache(self, total: int) -> transformers.Cache:
        if not self.compiled:
            return transformers.DynamicCache(config=self._model.config)
        if self._cache is None or self._room < total:
            self._cache, self._room = transformers.StaticCache(self._model.config, max_cache_len=total), total
        else:
            self._cache.reset()
        return self._cache


def _compiled(model: transformers.PreTrainedModel, *, dynamic: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # inductor, when imported, uses torch's own old interfaces
        return torch.compile(model, dynamic=dynamic)


def _finite(values: Floats, folder: Path) -> Floats:
    if not np.isfinite(values).all():
        raise NumericsError(f"{folder}: torch answered NaN or Inf")
    return values
