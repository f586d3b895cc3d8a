"""From a checked checkpoint to a transformers model, and from a model to the layers that a plan may replace.

Task and dimensions come from optimum (TasksManager, NormalizedConfigManager), which knows how each architecture
spells them; `_NORMALIZED_FALLBACK` is the one small table of our own, for the model types that optimum 2.3 lacks.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from optimum.exporters.tasks import TasksManager
from optimum.utils import NormalizedConfigManager
from optimum.utils.normalized_config import NormalizedTextConfig
from transformers.initialization import no_init_weights

from edgec import limits
from edgec.checkpoint import Checkpoint
from edgec.errors import CheckpointError, UnsupportedModelError

logger = logging.getLogger(__name__)

MIN_TABLE_ROWS = 64
"""Embedding tables with fewer rows (token types) are left alone [rows]: nothing to win."""

_NORMALIZED_FALLBACK = {
    # optimum 2.3's NormalizedConfigManager lacks these; their text configs use the common attribute names.
    name: NormalizedTextConfig
    for name in ("gemma2", "gemma3_text")
}

_BLOCK = re.compile(r"\.\d+\.")
"""The number of a transformer block in a tensor's name."""

ENCODER_TASK = "feature-extraction"
DECODER_TASK = "text-generation"
_NO_WINDOWS = frozenset({"llama", "gemma"})
"""Types of models whose code reads no `sliding_window`."""


@dataclass(frozen=True)
class Dimensions:
    """Of the transformer, as optimum normalises them [counts]."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


@dataclass(frozen=True)
class Layer:
    """A matrix that a plan may replace. tied_to: the embedding that a head shares its table with, or None."""

    name: str
    role: str
    shape: tuple[int, int]
    tied_to: str | None = None


def task_of(checkpoint: Checkpoint) -> str:
    """optimum's task name, from the class that config.architectures names. Raises UnsupportedModelError for others than
    feature extraction (encoders without a head) and text generation.
    """
    cls = _model_class(checkpoint)
    task = str(TasksManager.infer_task_from_model(cls))
    if task not in (ENCODER_TASK, DECODER_TASK):
        raise UnsupportedModelError(
            f"{checkpoint.architecture} does {task}; edgec exports {ENCODER_TASK} (encoders) and {DECODER_TASK} "
            "(causal LMs). Save the backbone alone, for example model.bert.save_pretrained(...)"
        )
    return task


def dimensions(checkpoint: Checkpoint) -> Dimensions:
    """Raises CheckpointError when a dimension is missing, not a number, or beyond edgec.limits."""
    config = hf_config(checkpoint)
    kind = checkpoint.model_type
    try:
        normal = NormalizedConfigManager.get_normalized_config_class(kind)(config)
    except KeyError:
        if kind not in _NORMALIZED_FALLBACK:
            raise UnsupportedModelError(
                f"{kind!r} is unknown to optimum and to edgec's fallback; cannot read its dimensions"
            ) from None
        normal = _NORMALIZED_FALLBACK[kind](config)
    try:
        heads, hidden = int(normal.num_attention_heads), int(normal.hidden_size)
        found = Dimensions(
            layers=int(normal.num_layers),
            hidden=hidden,
            heads=heads,
            kv_heads=_or(getattr(config, "num_key_value_heads", None), heads),
            head_dim=_or(getattr(config, "head_dim", None), hidden // max(1, heads)),
            vocabulary=int(normal.vocab_size),
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise _invalid(checkpoint, error) from error
    counts = {**vars(found), "max_position_embeddings": _or(getattr(config, "max_position_embeddings", None), 1)}
    for name, value in counts.items():
        top = limits.MAX_LAYERS if name == "layers" else limits.MAX_DIMENSION
        if not 1 <= value <= top:
            raise CheckpointError(f"{checkpoint.folder / 'config.json'}: {name} is {value}, expected 1 … {top}")
    return found


def hf_config(checkpoint: Checkpoint) -> transformers.PretrainedConfig:
    """The transformers configuration, built from the checked JSON; code that the checkpoint names is never run."""
    where = checkpoint.folder / "config.json"
    if "quantization_config" in checkpoint.config:
        raise UnsupportedModelError(
            f"{where}: already quantised (quantization_config); edgec compresses full-precision checkpoints"
        )
    if refused := sorted(_NAMES_CODE & set(checkpoint.config)):
        logger.warning("%s names code or files to load (%s); ignored", where, ", ".join(refused))
    values = _without_code(checkpoint.config)
    values.pop("edgec", None)
    kind = values.pop("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(f"unknown architecture {kind!r}: transformers {transformers.__version__} lacks it")
    try:
        with quiet_transformers():
            return transformers.AutoConfig.for_model(kind, **values)
    except Exception as error:  # whatever transformers' validators raise
        raise _invalid(checkpoint, error) from error


_NAMES_CODE = frozenset(
    {
        "auto_map",
        "attn_implementation",  # may name a kernel on the model hub
        "_attn_implementation",
        "experts_implementation",
        "_experts_implementation",
        "transformers_weights",  # another weight file than the one that was checked
    }
)


def _without_code(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_code(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _NAMES_CODE
    }


def _or(value: Any, default: int) -> int:
    return default if value is None else int(value)


def _invalid(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    told = " ".join(str(error).split())[:200] or type(error).__name__
    return CheckpointError(
        f"{checkpoint.folder / 'config.json'}: not a valid {checkpoint.model_type} configuration ({told})"
    )


def sliding_window(config: Any) -> int | None:
    """Positions that a layer with a window attends to; None where the transformers model has no such layers, whatever a
    conversion left behind in its config.
    """
    if str(getattr(config, "model_type", "")) in _NO_WINDOWS:
        return None
    window = getattr(config, "sliding_window", None)
    return None if window is None else int(window)


def without_memory(checkpoint: Checkpoint) -> transformers.PreTrainedModel:
    """The model on the meta device, by its configuration alone."""
    with torch.device("meta"):
        return _built(checkpoint)


def empty(checkpoint: Checkpoint) -> transformers.PreTrainedModel:
    """The model on the CPU with whatever its constructors put there: buffers are right, weights are to be loaded."""
    with no_init_weights():
        model = _built(checkpoint)
    model.float()
    return model


def hollow(checkpoint: Checkpoint) -> transformers.PreTrainedModel:
    """The model in eval mode with its buffers on the CPU, computed, and every parameter on the meta device.

    For running a model piece by piece: `without_memory` has no rotary frequencies and no position ids, and `empty`
    reserves the whole model.
    """
    with no_init_weights(), _parameters_on_meta():
        model = _built(checkpoint)
        model.tie_weights()  # which no_init_weights left out
    model.float()
    model.eval()
    model.requires_grad_(False)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that a module registers is replaced by one without memory, at once; ties stay ties."""
    register = torch.nn.Module.register_parameter

    def without(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = without  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def block_list(model: transformers.PreTrainedModel, planned: Collection[str]) -> str | None:
    """The name of the list of transformer blocks: the longest ModuleList whose items all hold planned layers.

    Lists inside the items of another one (experts) do not count. None where there is no such list.
    """
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if len(module) and all(any(p.startswith(f"{name}.{i}.") for p in planned) for i in range(len(module))):
            found[name] = len(module)
    return max(found, key=lambda name: found[name], default=None)


def _built(checkpoint: Checkpoint) -> transformers.PreTrainedModel:
    dimensions(checkpoint)
    cls, config = _model_class(checkpoint), hf_config(checkpoint)
    if not isinstance(config, cls.config_class):
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: model_type {checkpoint.model_type!r} and architecture "
            f"{checkpoint.architecture!r} do not belong together"
        )
    try:
        with quiet_transformers():
            model: transformers.PreTrainedModel = cls(config)
    except Exception as error:  # sizes that contradict one another, unknown activations
        raise _invalid(checkpoint, error) from error
    _drop_pooler(model)
    return model


def skeleton(checkpoint: Checkpoint) -> transformers.PreTrainedModel:
    """`without_memory`, its shapes checked against the checkpoint's before anything is allocated."""
    model = without_memory(checkpoint)
    expected = model.state_dict()
    found = places(model, checkpoint)
    for name, place in found.items():
        info, shape = checkpoint.tensors[name], tuple(expected[place].shape)
        if shape != info.shape:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} is {list(info.shape)}, config.json makes it {list(shape)}"
            )
    if len(set(found.values())) < len(found):
        repeated = sorted(name for name, place in found.items() if list(found.values()).count(place) > 1)
        raise CheckpointError(f"{checkpoint.folder}: tensors {repeated[0]!r} and {repeated[1]!r} are the same weight")
    for stray in sorted(set(checkpoint.tensors) - set(found)):
        if _BLOCK.search(stray) and places_of([_BLOCK.sub(".0.", stray, count=1)], model):
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {stray!r} is in a block that config.json does not count"
            )
        logger.info("tensor %r of the checkpoint has no place in %s; ignored", stray, type(model).__name__)
    tied = set(_tied_names(model))
    if missing := sorted(set(expected) - set(found.values()) - tied):
        raise CheckpointError(f"{checkpoint.folder}: {len(missing)} tensors are missing, first {missing[0]!r}")
    return model


def places(model: transformers.PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor of the checkpoint → the model's own name for it; strays are left out."""
    return places_of(checkpoint.tensors, model)


def places_of(names: Iterable[str], model: transformers.PreTrainedModel) -> dict[str, str]:
    """Checkpoints come with and without the backbone's prefix; the oldest call a norm's weight gamma, its bias beta."""
    known = set(model.state_dict())
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name in names:
        modern = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        place = next((n for n in (modern, prefix + modern, modern.removeprefix(prefix)) if n in known), None)
        if place is not None:
            found[name] = place
    return found


def load_dense(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """The dense model on the CPU, in eval mode. Raises CheckpointError where tensors are missing or of other shapes."""
    skeleton(checkpoint)
    cls = _model_class(checkpoint)
    with quiet_transformers():
        model: transformers.PreTrainedModel = cls.from_pretrained(
            checkpoint.folder,
            config=hf_config(checkpoint),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    _drop_pooler(model)
    model.eval()
    model.requires_grad_(False)
    return model


def layers(model: transformers.PreTrainedModel) -> list[Layer]:
    """Every matrix that a plan may replace, in module order: block linears, the head, embedding tables."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            role = "head" if module is head else "linear"
            tied_to = names[id(embedding)] if module is head and tied else None
            found.append(Layer(name, role, (module.out_features, module.in_features), tied_to))
        elif isinstance(module, torch.nn.Embedding) and module.num_embeddings >= MIN_TABLE_ROWS:
            found.append(Layer(name, "embedding", (module.num_embeddings, module.embedding_dim)))
    return found


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers' progress bars and advice, which would drown edgec's own; its warnings go to logging."""
    progress, level = transformers.utils.logging.is_progress_bar_enabled(), transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        if progress:
            transformers.utils.logging.enable_progress_bar()


def _model_class(checkpoint: Checkpoint) -> Any:
    name = checkpoint.architecture
    cls = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise UnsupportedModelError(
            f"unknown architecture {name!r}; expected a model class of transformers {transformers.__version__}"
        )
    return cls


def _drop_pooler(model: transformers.PreTrainedModel) -> None:
    """BERT's pooler feeds next-sentence heads only; embeddings are pooled from the last hidden state."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # type: ignore[assignment]


def _tied_names(model: transformers.PreTrainedModel) -> list[str]:
    if not getattr(model.config, "tie_word_embeddings", False):
        return []
    keys = getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or []
    return list(keys)
