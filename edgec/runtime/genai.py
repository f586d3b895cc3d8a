"""Causal LMs on onnxruntime-genai: the folder that its mobile and desktop applications load.

Only the runtime is imported: `onnxruntime_genai.models` (the builder) needs torch and belongs to the export.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.errors import CheckpointError, RuntimeUnavailableError
from edgec.runtime.interfaces import CAUSAL_LM, Floats, Ids, Piece
from edgec.runtime.layout import inside, read_json, whole_number
from edgec.runtime.options import RuntimeOptions, genai_config, import_genai, refuse_kv_cache
from edgec.runtime.prompts import check_prompt, check_sampling

PLUGIN = True


def claims(folder: Path) -> bool:
    return (folder / "genai_config.json").is_file()


def prepare() -> dict[str, str]:
    return {"onnxruntime-genai": str(import_genai().__version__), "onnxruntime": metadata.version("onnxruntime")}


def load(folder: Path, options: RuntimeOptions) -> GenaiModel:
    return GenaiModel(folder, options)


_SESSION_KEYS = frozenset(
    (
        "log_id", "log_severity_level", "log_verbosity_level", "graph_optimization_level", "provider_options",
        "intra_op_num_threads", "inter_op_num_threads", "enable_cpu_mem_arena", "enable_mem_pattern",
        "use_env_allocators", "disable_quant_qdq", "enable_quant_qdq_cleanup",
    )
)  # fmt: skip
_SESSION_ENTRIES = (
    "session.intra_op.", "session.inter_op.", "session.dynamic_block_base", "session.set_denormal_as_zero",
    "session.disable_prepacking", "session.use_device_allocator_for_initializers", "mlas.", "ep.cuda.",
    "optimization.disable_specified_optimizers",
)  # fmt: skip
"""Entries that only say how fast to be; others name files and libraries."""
_PROVIDERS: dict[str, frozenset[str]] = {
    "cpu": frozenset(),
    "cuda": frozenset(
        (
            "arena_extend_strategy", "cudnn_conv1d_pad_to_nc1d", "cudnn_conv_algo_search",
            "cudnn_conv_use_max_workspace", "device_id", "do_copy_in_default_stream", "enable_cuda_graph",
            "enable_skip_layer_norm_strict_mode", "gpu_mem_limit", "prefer_nhwc", "tunable_op_enable",
            "tunable_op_max_tuning_duration_ms", "tunable_op_tuning_enable", "use_ep_level_unified_stream", "use_tf32",
        )
    ),
}  # fmt: skip
"""Providers that edgec runs, and the options of theirs that genai's builder writes; others hold pointers and paths."""


def refuse_libraries(config: Any, path: Path) -> None:
    """genai_config.json can name native libraries that genai loads, and files that it writes (`custom_ops_library`,
    back ends of providers, profiles). Nothing of the kind is in a folder that only holds a model.

    Looks at every object of the file, however deep. Raises CheckpointError for a session option or a provider that is
    not known to be harmless.
    """
    waiting = [config]
    while waiting:
        found = waiting.pop()
        waiting += found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
        options = found.get("session_options", {}) if isinstance(found, dict) else {}
        for key in options if isinstance(options, dict) else ("session_options",):
            if key not in _SESSION_KEYS and not key.startswith(_SESSION_ENTRIES):
                raise CheckpointError(f"{path}: the session option {key[:80]!r} is not one that edgec lets a file set")
        providers = found.get("provider_options", []) if isinstance(found, dict) else []
        for entry in providers if isinstance(providers, list) else ("provider_options",):
            for name, chosen in entry.items() if isinstance(entry, dict) else ((str(entry), {}),):
                known = _PROVIDERS.get(name.lower().removesuffix("executionprovider"))
                if known is None or not isinstance(chosen, dict) or chosen.keys() - known:
                    raise CheckpointError(
                        f"{path}: the provider {str(entry)[:80]!r} is not one that edgec lets a file set; known are "
                        f"{', '.join(_PROVIDERS)}"
                    )


class GenaiModel:
    """A generator with its tokenizer. Token ids are Python ints; logits are float32."""

    task = CAUSAL_LM
    runtime = "onnxruntime-genai"

    def __init__(self, folder: Path | str, options: RuntimeOptions | None = None) -> None:
        """Loads `folder`. Raises CheckpointError for missing or contradicting files, RuntimeUnavailableError."""
        refuse_kv_cache(options, self.runtime)
        self.folder = Path(folder)
        config_path = self.folder / "genai_config.json"
        config = read_json(config_path, unique=True)
        refuse_libraries(config, config_path)
        model = config.get("model")
        decoder = model.get("decoder") if isinstance(model, dict) else None
        if not isinstance(model, dict) or not isinstance(decoder, dict):
            raise CheckpointError(f"{config_path} has no model.decoder; it is not a decoder that edgec can run")
        self.vocab_size = whole_number(model, "vocab_size", config_path)
        self.context_length = whole_number(model, "context_length", config_path)
        inside(self.folder, decoder.get("filename", "model.onnx"), config_path)
        self._og = import_genai()
        try:
            self._model = self._og.Model(genai_config(self.folder, options or RuntimeOptions()))
            self._tokenizer = self._og.Tokenizer(self._model)
        except RuntimeUnavailableError:
            raise
        except Exception as error:  # the binding raises RuntimeError and friends for every kind of bad file
            raise CheckpointError(f"onnxruntime-genai cannot load {self.folder}: {error}") from error

    def encode(self, text: str) -> list[int]:
        return [int(t) for t in self._tokenizer.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(np.asarray(ids, dtype=np.int32)))

    def generate(
        self, prompt: str | Sequence[int], max_new_tokens: int = 128, greedy: bool = True, **sampling: Any
    ) -> Iterator[Piece]:
        """Streams the continuation of a text or of token ids.

        sampling: temperature, top_k, top_p, repetition_penalty, random_seed; only read when `greedy` is False.
        """
        check_sampling(sampling)
        ids = self.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        check_prompt(ids, 1, self.context_length, self.vocab_size)
        total = min(len(ids) + max_new_tokens, self.context_length)
        options: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, **sampling}
        return self._stream(ids, total, options)

    def _stream(self, ids: list[int], total: int, options: dict[str, Any]) -> Iterator[Piece]:
        stream = self._tokenizer.create_stream()
        ends = self.ends
        generator = self._generator(total, **options)
        generator.append_tokens(np.asarray(ids, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in ends:
                return
            yield Piece(token, str(stream.decode(token)))

    @property
    def ends(self) -> list[int]:
        return [int(token) for token in self._tokenizer.eos_token_ids]

    def forced(self, ids: Sequence[int], new_tokens: int) -> Iterator[int]:
        """Exactly `new_tokens` greedy tokens after `ids`; a minimum length masks the end of text.

        The first token comes after the prefill, each other after one decode step. The KV cache is allocated for
        exactly len(ids) + new_tokens positions, inside the first step.
        """
        ids = [int(i) for i in ids]
        check_prompt(ids, new_tokens, self.context_length, self.vocab_size, least=1)
        total = len(ids) + new_tokens
        generator = self._generator(total, do_sample=False, min_length=total)
        generator.append_tokens(np.asarray(ids, dtype=np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def logits(self, ids: Ids) -> Floats:
        """Token ids [1, T] or [T] → logits [T, V] float32 of every position, as genai computes them.

        One prefill where the graph gives all positions. Heads that see the last one only, as edgec's do here, are fed
        token by token: `OrtDecoder` has those graphs' logits in fewer runs.
        """
        flat = np.asarray(ids).reshape(-1)
        check_prompt([int(i) for i in flat], 1, self.context_length, self.vocab_size)
        whole = self._appended(self._generator(len(flat) + 1, do_sample=False), flat)
        if len(whole) == len(flat):
            return whole
        generator = self._generator(len(flat) + 1, do_sample=False)
        return np.concatenate([self._appended(generator, flat[i : i + 1]) for i in range(len(flat))])

    def _appended(self, generator: Any, ids: NDArray[np.int64]) -> Floats:
        generator.append_tokens(ids.astype(np.int32))
        logits: Floats = np.asarray(generator.get_output("logits"), dtype=np.float32)[0]
        return logits

    def _generator(self, total: int, **options: Any) -> Any:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=total, batch_size=1, **options)
        return self._og.Generator(self._model, params)
