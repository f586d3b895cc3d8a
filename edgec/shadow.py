"""`edgec shadow`: real prompts through the dense model and an artifact side by side, and where the two part.

An average over held-out text says how far an artifact is from its model; it does not say on which of *your* prompts.
So every prompt is a case of its own, the worst ones come first, and what each model answered is there to read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from edgec.calibration import json_lines, read_utf8
from edgec.errors import CalibrationError, CheckpointError, UsageError
from edgec.evaluate.embeddings import cosine, torch_embedder
from edgec.evaluate.language import torch_logits
from edgec.inspection import manifest_of
from edgec.runtime import open_artifact
from edgec.runtime.interfaces import CAUSAL_LM, CausalLM, Encoder
from edgec.workspace import Workspace

MAX_PROMPTS = 100_000
"""Most prompts that are replayed in one run [count]."""


@dataclass(frozen=True)
class Prompt:
    """line: in the traffic file, from 1."""

    line: int
    text: str


@dataclass(frozen=True)
class Case:
    """One prompt through both models.

    divergence: causal LMs, mean KL(dense ‖ artifact) over the prompt's tokens [nats]; encoders, 1 − cosine.
    agreement: share of tokens with the same likeliest successor; None for encoders. differs_at: the first greedy token
    that differs, counted from 0; None where none did. dense, artifact: what each answered.
    """

    line: int
    prompt: str
    tokens: int
    divergence: float
    agreement: float | None = None
    differs_at: int | None = None
    dense: str = ""
    artifact: str = ""


@dataclass(frozen=True)
class Shadow:
    """task: "causal-lm" or "encoder". cases: in the traffic's order. new_tokens: length of the greedy answers."""

    task: str
    cases: tuple[Case, ...]
    new_tokens: int

    def worst(self, count: int) -> tuple[Case, ...]:
        """The cases that diverge most, the worst first; NaN is worse than any number. Real traffic repeats itself: of
        equal prompts the first is shown.
        """
        different = {case.prompt: case for case in reversed(self.cases)}
        return tuple(sorted(different.values(), key=lambda c: (-_orderable(c.divergence), c.line))[:count])

    def summary(self) -> dict[str, Any]:
        """Over prompts, each weighing the same."""
        found = np.array([c.divergence for c in self.cases])
        told: dict[str, Any] = {
            "prompts": len(self.cases),
            "tokens": sum(c.tokens for c in self.cases),
            "divergence": "KL from dense [nats per token]" if self.task == CAUSAL_LM else "1 - cosine to dense",
            "mean": float(found.mean()),
            "median": float(np.median(found)),
            "p95": float(np.quantile(found, 0.95)),
            "worst": float(found.max()),
        }
        if self.task == CAUSAL_LM:
            weights = np.array([c.tokens for c in self.cases])
            agreed = np.array([cast(float, c.agreement) for c in self.cases])
            told["top1_agreement"] = float((agreed * weights).sum() / weights.sum())
            if self.new_tokens:
                told["same_answer"] = sum(c.differs_at is None for c in self.cases) / len(self.cases)
                told["answer_tokens"] = self.new_tokens
        return told

    def as_dict(self) -> dict[str, Any]:
        """JSON without NaN: what is no number is null."""
        cases = [asdict(c) | {"divergence": _finite(c.divergence)} for c in self.cases]
        summary = {k: _finite(v) if isinstance(v, float) else v for k, v in self.summary().items()}
        return {"task": self.task, "summary": summary, "cases": cases}


def read_traffic(path: Path, limit: int = MAX_PROMPTS) -> list[Prompt]:
    """A .jsonl of strings, or of objects with "prompt" or "text". Raises CalibrationError naming the line."""
    prompts = []
    for number, text in islice(json_lines(path, read_utf8(path), "prompt", "text"), limit):
        if not text.strip():
            raise CalibrationError(f"{path}:{number}: the prompt is empty")
        prompts.append(Prompt(number, text))
    if not prompts:
        raise CalibrationError(f"{path}: no prompts in it")
    return prompts


def shadow(
    model: Path,
    artifact: Path,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 512,
    new_tokens: int = 32,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Shadow:
    """Replay prompts. max_tokens: what is kept of each, from its beginning. new_tokens: of the greedy answers, 0: none.

    Raises CheckpointError for an artifact of another model, UsageError where the two do different things.
    """
    workspace = Workspace(model)
    _require_same_model(artifact, workspace)
    loaded = open_artifact(artifact)
    if (loaded.task == CAUSAL_LM) != (workspace.pooling is None):
        raise UsageError(
            f"{artifact} is for {loaded.task}, {model} for {workspace.task}; give the model it was made from"
        )
    if workspace.pooling is not None:
        return Shadow(loaded.task, _encoder_cases(workspace, cast(Encoder, loaded), prompts, progress), 0)
    other = cast(CausalLM, loaded)
    if other.vocab_size != (known := int(workspace.model.config.vocab_size)):
        raise CheckpointError(f"{artifact} has {other.vocab_size} tokens, {model} {known}; give its own model")
    cases = []
    for done, prompt in enumerate(prompts):
        progress("replaying", done, len(prompts))
        cases.append(_causal_case(workspace, other, prompt, max_tokens, new_tokens))
    return Shadow(loaded.task, tuple(cases), new_tokens)


def _require_same_model(artifact: Path, workspace: Workspace) -> None:
    made_from = manifest_of(artifact).get("fingerprint")
    if made_from is not None and made_from != workspace.checkpoint.fingerprint:
        raise CheckpointError(f"{artifact} was made from another model than {workspace.folder}; give that one")


def _encoder_cases(
    workspace: Workspace, other: Encoder, prompts: Sequence[Prompt], progress: Callable[[str, int, int], None]
) -> tuple[Case, ...]:
    assert workspace.pooling is not None
    texts = [p.text for p in prompts]
    progress("replaying", 0, 2)
    dense = torch_embedder(workspace.model, workspace.tokenizer, workspace.pooling, max_tokens=workspace.context)(texts)
    progress("replaying", 1, 2)
    losses = 1.0 - cosine(dense, other.embed(texts))
    return tuple(
        Case(p.line, p.text, other.token_count([p.text]), float(loss)) for p, loss in zip(prompts, losses, strict=True)
    )


def _causal_case(workspace: Workspace, other: CausalLM, prompt: Prompt, max_tokens: int, new_tokens: int) -> Case:
    room = min(workspace.context, other.context_length) - max(1, new_tokens)
    ids: list[int] = workspace.tokenizer(prompt.text)["input_ids"][: max(1, min(max_tokens, room))]
    if not ids:
        raise CalibrationError(f"line {prompt.line} of the traffic: no tokens in {prompt.text[:40]!r}")
    row = np.array([ids], np.int64)
    p = torch.from_numpy(torch_logits(workspace.model)(row)[0]).log_softmax(-1)
    q = torch.from_numpy(np.asarray(other.logits(row), np.float32)[-len(ids) :]).log_softmax(-1)
    case = Case(
        line=prompt.line,
        prompt=prompt.text,
        tokens=len(ids),
        divergence=float((p.exp() * (p - q)).sum(-1).mean()),
        agreement=float((p.argmax(-1) == q.argmax(-1)).float().mean()),
    )
    if new_tokens < 1:
        return case
    # One count of tokens for both, end of text suppressed as in a benchmark: where they part is all that is asked.
    theirs = list(other.forced(ids, new_tokens))
    ours = _greedy(workspace, row, theirs, other.ends)
    differs = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    decode = workspace.tokenizer.decode
    return replace(case, differs_at=differs, dense=decode(ours), artifact=decode(theirs))


def _greedy(
    workspace: Workspace, row: NDArray[np.int64], theirs: Sequence[int], banned: Sequence[int]
) -> list[int]:
    """As many greedy tokens of the dense model, without those that the artifact's runtime suppresses."""
    model = workspace.model
    found: list[int] = []
    step, cache = torch.from_numpy(row), None
    with torch.no_grad():
        for _ in theirs:
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            scores = out.logits[0, -1].float()
            scores[list(banned)] = -torch.inf
            found.append(int(scores.argmax()))
            step, cache = torch.tensor([[found[-1]]]), out.past_key_values
    return found


def _orderable(value: float) -> float:
    return value if np.isfinite(value) else np.inf


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
