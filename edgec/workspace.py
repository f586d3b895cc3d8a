"""One checkpoint with everything the stages ask of it, each made once and only when asked: model, tokenizer, text.

The stages themselves are ordered in `pipeline`; this is what they share.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from edgec import calibration, limits, modeling
from edgec.calibration import Batches, Text
from edgec.checkpoint import Checkpoint, open_checkpoint
from edgec.errors import CalibrationError
from edgec.evaluate.embeddings import cosine, embed_batches
from edgec.evaluate.language import LanguageQuality, compare, torch_logits
from edgec.fit import FactorCache, Factors
from edgec.modeling import DECODER_TASK, Layer
from edgec.pooling import Pooling, read_pooling
from edgec.runtime import ort_encoder

CALIBRATION_TOKENS = 32_768
"""Tokens that statistics are collected from [tokens]."""
EVALUATION_TOKENS = 8_192
"""Tokens that quality is reported on [tokens]."""
SEARCH_TOKENS = 8_192
"""Tokens that whole plans are compared on [tokens]."""
HEALING_TOKENS = 1_000_000
"""Most tokens of a split that healing learns from [tokens]."""
HEALING_BATCH = 1024
"""Tokens of one step of healing: what trains codes is the number of steps, not their size [tokens]."""
_FEWEST_TOKENS = {"heal": 0, "search": limits.MIN_COMPARISON_TOKENS}
"""Where less than for statistics is enough: healing learns from the calibration text first of all."""
_SAMPLED_TOKENS = 8_192
_SAMPLE_UP_TO = 100_000_000
"""Largest causal LM that text is sampled from [parameters]: beyond it, sampling takes longer than it is worth."""


@dataclass(frozen=True)
class EncoderQuality:
    """cosine: mean cosine to the dense model's embeddings. low: their 5 % quantile. sentences: how many."""

    cosine: float
    low: float
    sentences: int


@dataclass
class Workspace:
    """folder: the transformers folder. text: the calibration source, None for the default one."""

    folder: Path
    calibration_file: Path | None = None
    cache: FactorCache = field(default_factory=FactorCache)
    _finite: bool = False

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.folder)

    @cached_property
    def task(self) -> str:
        return modeling.task_of(self.checkpoint)

    @cached_property
    def model(self) -> transformers.PreTrainedModel:
        """The dense model, float32; every weight is checked to be finite first."""
        self.require_finite()
        return modeling.load_dense(self.checkpoint)

    def forget_model(self) -> None:
        """Give back the dense model's memory, where sampling text from it had needed it."""
        self.__dict__.pop("model", None)

    def require_finite(self) -> None:
        """Check every weight once. Raises NumericsError naming the tensor."""
        if not self._finite:
            self.checkpoint.check_finite()
            self._finite = True

    @cached_property
    def _trial(self) -> transformers.PreTrainedModel:
        """The dense model's modules over again, on the same parameters: what `substituted` changes."""
        return copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})

    @cached_property
    def layers(self) -> list[Layer]:
        return modeling.layers(modeling.skeleton(self.checkpoint))

    @cached_property
    def tokenizer(self) -> Any:
        return calibration.load_tokenizer(self.checkpoint)

    @cached_property
    def pooling(self) -> Pooling | None:
        """None for a causal LM; mean and normalised for an encoder that does not say."""
        if self.task == DECODER_TASK:
            return None
        return read_pooling(self.folder) or Pooling("mean", normalize=True)

    @cached_property
    def context(self) -> int:
        """Longest input that the model takes [tokens]."""
        if self.task == DECODER_TASK:
            return int(self.checkpoint.config.get("max_position_embeddings") or calibration.DECODER_LENGTH)
        return ort_encoder.max_tokens(self.folder, dict(self.checkpoint.config))

    @cached_property
    def text(self) -> Text:
        return calibration.load_text(self.calibration_file)

    def batches(
        self,
        split: str,
        max_tokens: int,
        *,
        batch_tokens: int = calibration.BATCH_TOKENS,
        minimum: int | None = None,
    ) -> Batches:
        """Tokens of one split of the text; on the default text, a causal LM adds some sampled from itself. minimum:
        fewer raise CalibrationError.
        """
        fewest = _FEWEST_TOKENS.get(split, limits.MIN_CALIBRATION_TOKENS) if minimum is None else minimum
        found = calibration.tokenize(
            self.text.split(split),
            self.tokenizer,
            self.task,
            max_tokens,
            context=self.context,
            batch_tokens=batch_tokens,
            minimum=fewest,
        )
        if self.calibration_file is None and self.task == DECODER_TASK and self.checkpoint.parameters <= _SAMPLE_UP_TO:
            seed = calibration.SPLITS.index(split)
            sampled = calibration.self_sampled(self.model, min(_SAMPLED_TOKENS, max_tokens), seed, batch_tokens)
            return Batches(f"{found.origin} + {sampled.origin}", found.items + sampled.items)
        return found

    @cached_property
    def calibration_batches(self) -> Batches:
        """What statistics are collected from."""
        return self.batches("calibrate", CALIBRATION_TOKENS)

    @cached_property
    def search_batches(self) -> Batches:
        """What whole plans are compared on: text that taught nothing and that no figure is reported on."""
        return self.batches("search", SEARCH_TOKENS)

    @cached_property
    def healing_batches(self) -> Batches:
        """What a compressed model learns from: the text that calibrated it and more, in batches of a training step's
        size.
        """
        parts = [self.batches(split, HEALING_TOKENS, batch_tokens=HEALING_BATCH) for split in ("calibrate", "heal")]
        return Batches(" + ".join(p.origin for p in parts), tuple(b for p in parts for b in p.items))

    @cached_property
    def judging_batches(self) -> Batches:
        """What a healing run is judged on along the way: every other batch of `search_batches`."""
        return Batches(self.search_batches.origin, self.search_batches.items[::2])

    @cached_property
    def report_batches(self) -> Batches:
        """What quality is reported on: text that neither calibrated nor chose a plan."""
        return self.batches("validate", EVALUATION_TOKENS)

    @cached_property
    def random_batches(self) -> Batches:
        """Random token ids, for checking structure where there is no text that the model knows: [2, 32]."""
        vocabulary = modeling.dimensions(self.checkpoint).vocabulary
        ids = torch.randint(0, vocabulary, (2, min(32, self.context)), generator=torch.Generator().manual_seed(0))
        return Batches("random tokens", ({"input_ids": ids, "attention_mask": torch.ones_like(ids)},))

    def weight(self, name: str) -> NDArray[Any]:
        """A layer's weight, float32 [out, in], read from the file (a tied head's from its table)."""
        stored = self._stored
        source = stored.get(f"{name}.weight") or stored[f"{self._tied[name]}.weight"]
        return np.asarray(self.checkpoint.read(source), dtype=np.float32)

    @cached_property
    def _stored(self) -> dict[str, str]:
        found = modeling.places(modeling.without_memory(self.checkpoint), self.checkpoint)
        return {place: name for name, place in found.items()}

    @cached_property
    def _tied(self) -> dict[str, str | None]:
        return {layer.name: layer.tied_to for layer in self.layers}

    def divergence_on_search(self, model: transformers.PreTrainedModel) -> float:
        """What plans are compared by."""
        return self.divergence(model, self.search_batches)

    def accepted_loss(self, model: transformers.PreTrainedModel) -> float:
        """What `--max-loss` limits: 1 − mean cosine, or the relative increase of perplexity."""
        if self.pooling is not None:
            return self.divergence_on_search(model)
        found = self.language_quality(torch_logits(model), self.search_batches)
        return found.perplexity_ratio - 1.0

    @cached_property
    def second_batches(self) -> Batches:
        """Text that neither calibrated nor compared plans, which has the last word on a long search: has it only learnt
        what it was measured on? Raises CalibrationError for too little.
        """
        return self.batches("heal", SEARCH_TOKENS, minimum=limits.MIN_COMPARISON_TOKENS)

    def divergence(self, model: transformers.PreTrainedModel, batches: Batches) -> float:
        """End-to-end loss against the dense model: KL [nats per token], or 1 − mean cosine."""
        if self.pooling is None:
            return self.language_quality(torch_logits(model), batches).kl
        return 1.0 - float(cosine(self._dense_embeddings(batches), embed_batches(model, batches, self.pooling)).mean())

    def language_quality(
        self, logits: Callable[[NDArray[np.int64]], NDArray[np.float32]], batches: Batches
    ) -> LanguageQuality:
        return compare(torch_logits(self.model), logits, batches)

    def encoder_quality(self, vectors: NDArray[np.float32], batches: Batches) -> EncoderQuality:
        """vectors [N, d]: the embeddings of the batches' rows by the model in question."""
        cosines = cosine(self._dense_embeddings(batches), vectors)
        return EncoderQuality(float(cosines.mean()), float(np.quantile(cosines, 0.05)), len(cosines))

    def _dense_embeddings(self, batches: Batches) -> NDArray[np.float32]:
        assert self.pooling is not None
        key = id(batches)
        if key not in self._embedded:
            self._embedded[key] = (batches, embed_batches(self.model, batches, self.pooling))
        return self._embedded[key][1]

    @cached_property
    def _embedded(self) -> dict[int, tuple[Batches, NDArray[np.float32]]]:
        return {}

    @contextmanager
    def substituted(
        self, factors: Mapping[str, Factors], vectors: Mapping[str, NDArray[np.float32]] = MappingProxyType({})
    ) -> Iterator[transformers.PreTrainedModel]:
        """A model with the factors' matrices in place of the dense weights, for the length of the block.

        vectors: biases and norms by the model's own names, where they changed too.
        """
        kept: dict[str, torch.nn.Parameter] = {}
        plain: dict[str, torch.nn.Parameter] = {}
        try:
            for name, values in vectors.items():
                owner, _, attribute = name.rpartition(".")
                plain[name] = self._trial.get_parameter(name)
                changed = torch.nn.Parameter(torch.from_numpy(values), requires_grad=False)
                setattr(self._trial.get_submodule(owner), attribute, changed)
            for name, fitted in factors.items():
                module = self._trial.get_submodule(name)
                weight = module.weight
                assert isinstance(weight, torch.nn.Parameter)
                kept[name] = weight
                module.weight = torch.nn.Parameter(torch.from_numpy(fitted.dense()), requires_grad=False)
            yield self._trial
        finally:
            for name, parameter in kept.items():
                self._trial.get_submodule(name).weight = parameter
            for name, parameter in plain.items():
                owner, _, attribute = name.rpartition(".")
                setattr(self._trial.get_submodule(owner), attribute, parameter)

    def loss_with(
        self,
        factors: Mapping[str, Factors],
        loss: Callable[[transformers.PreTrainedModel], float],
        vectors: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
    ) -> float:
        """`loss` of the model with these in place: of the numbers as they ship, in float32."""
        with self.substituted(factors, vectors) as model:
            return loss(model)


def require_text(workspace: Workspace) -> None:
    """Fail before long work when the text cannot serve all three splits. Raises CalibrationError."""
    for split in calibration.SPLITS:
        if split != "heal" and not workspace.text.split(split).items:
            raise CalibrationError(
                f"{workspace.text.origin}: {len(workspace.text.items)} items leave the {split} "
                "split empty; give more with --calibration"
            )
