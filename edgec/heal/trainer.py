"""The healing run: a clock, a learning rate that falls with it, checkpoints that survive, and a judge that is not
fooled.

What counts is the divergence from the dense model on held-out text. The best state by that measure is kept; a run
that does not beat its own start is thrown away; one that diverges goes back to its best state at half the rate.

The whole model learns at once. What a block can learn on its own it has when it comes here (`pipeline.refit`, in closed
form): steps in which every block followed its own gradients made each of three models worse, and were undone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from edgec.heal.cores import Student
from edgec.heal.losses import Batch, distillation_loss, look
from edgec.heal.settings import HealSettings
from edgec.heal.state import RunState, load_state, save_state
from edgec.pooling import Pooling

logger = logging.getLogger(__name__)

_WARMUP = 0.04
"""Share of the run over which the learning rate rises."""
_CHECKS = 10
"""How often the held-out divergence is measured in a run."""
_JUDGING = 0.12
"""Largest share of a timed run that is spent on judging it."""
_DIVERGED = 3.0
"""A held-out divergence this many times the best one is a run gone wrong."""
_MAX_RESTARTS = 3


@dataclass(frozen=True)
class Curve:
    """What happened. points: (seconds, step, held-out divergence as the run saw it, in its working precision), the
    start first. before, after: its first and its least value; steps: when that was. kept: is the result better?
    """

    points: tuple[tuple[float, int, float], ...]
    before: float
    after: float
    steps: int
    kept: bool
    notes: tuple[str, ...] = ()


@dataclass
class HealRun:
    """teacher: the dense model. batches: token batches to learn from. judge: a model → its divergence on held-out text.
    state_file: where an interrupted run goes on from; key: what it must match.
    """

    student: Student
    teacher: transformers.PreTrainedModel
    batches: Sequence[Batch]
    judge: Callable[[transformers.PreTrainedModel], float]
    settings: HealSettings
    pooling: Pooling | None = None
    state_file: Path | None = None
    key: str = ""
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)
    rate: float = 1.0

    def run(self) -> Curve:
        """Train in place; the student ends in its best state."""
        model, notes = self.student.model, []
        rates = self.student.rates()
        optimizer = torch.optim.Adam([{"params": [p], "lr": r} for p, r in rates], betas=(0.9, 0.98))
        parameters = [p for p, _ in rates]
        state = self._resumed(parameters, optimizer)
        if state is None:
            before = self._judged()
            state = RunState(self.key, best=_copy(parameters), best_value=before, points=[(0.0, 0, before)])
        else:
            notes.append(f"resumed at step {state.step}")
        started = time.monotonic() - state.seconds
        restarts, mark, judging = 0, self._share(state) + 1 / _CHECKS, 0.0
        for batch in self._stream(state.step):
            for group, (_, base) in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = base * self.rate * state.damping * _schedule(self._share(state))
            loss = self._step(batch, optimizer)
            state = replace(state, step=state.step + 1, seconds=time.monotonic() - started)
            share = self._share(state)
            self.progress(int(1000 * share), 1000)
            busy = self.settings.mode != "steps" and judging > _JUDGING * state.seconds
            if math.isfinite(loss) and share < 1 and (share < mark or busy):
                continue
            mark = share + 1 / _CHECKS
            begun = time.monotonic()
            value = self._judged() if math.isfinite(loss) else math.nan
            judging += time.monotonic() - begun
            state.points.append((state.seconds, state.step, value))
            logger.info("healing: step %d, %.0f s, held-out divergence %.5f", state.step, state.seconds, value)
            if value < state.best_value:
                state = replace(state, best=_copy(parameters), best_value=value, best_step=state.step)
            elif not value < _DIVERGED * state.best_value:
                _restore(parameters, state.best)
                optimizer.state.clear()
                restarts += 1
                notes.append(f"diverged at step {state.step}; went back to the best state at half the rate")
                state = replace(state, damping=state.damping / 2)
            self._save(state, parameters, optimizer)
            if share >= 1 or restarts > _MAX_RESTARTS:
                break
        _restore(parameters, state.best)
        model.eval()
        before = state.points[0][2]
        kept = state.best_value < before
        self.progress(1000, 1000)
        return Curve(tuple(state.points), before, state.best_value, state.best_step, kept, tuple(notes))

    def rehearse(self) -> None:
        """One pass forward and backward that changes nothing: how long does a step take here?"""
        batch = {name: tensor.to(self.settings.device) for name, tensor in self.batches[0].items()}
        with torch.no_grad(), self._autocast():
            wanted = look(self.teacher, batch)
        with self._autocast():
            own = look(self.student.model, batch)
        distillation_loss(own, wanted, batch, self.pooling).backward()
        self.student.model.zero_grad(set_to_none=True)

    def _share(self, state: RunState) -> float:
        """How much of the run is over, 0 … 1."""
        spent = state.step if self.settings.mode == "steps" else state.seconds
        return min(1.0, spent / max(self.settings.amount, 1e-9))

    def _step(self, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
        batch = {name: tensor.to(self.settings.device) for name, tensor in batch.items()}
        with torch.no_grad(), self._autocast():
            wanted = look(self.teacher, batch)
        with self._autocast():
            own = look(self.student.model, batch)
        loss = distillation_loss(own, wanted, batch, self.pooling)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        value = float(loss.detach())
        if math.isfinite(value):
            optimizer.step()
            self.student.confine()
        return value

    def _autocast(self) -> torch.autocast:
        """bfloat16 products: twice as fast where the CPU has them, and far finer than the codes that are trained."""
        return torch.autocast(
            self.settings.device.partition(":")[0], torch.bfloat16, enabled=_fast_bfloat16(self.settings.device)
        )

    def _judged(self) -> float:
        self.student.model.eval()
        with torch.no_grad(), self._autocast():
            return self.judge(self.student.model)

    def _stream(self, start: int) -> Iterator[Batch]:
        """Batches without end, every epoch in an order of its own; the order depends on the seed and the step alone."""
        count = len(self.batches)
        step = start
        while True:
            order = np.random.default_rng((self.settings.seed, step // count)).permutation(count)
            for index in order[step % count :]:
                yield self.batches[int(index)]
                step += 1

    def _resumed(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> RunState | None:
        return load_state(self.state_file, self.key, parameters, optimizer) if self.state_file else None

    def _save(self, state: RunState, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        if self.state_file:
            save_state(self.state_file, state, parameters, optimizer)


def _schedule(share: float) -> float:
    """Warm-up, then half a cosine down to a fiftieth."""
    if share < _WARMUP:
        return (share + 1e-3) / _WARMUP
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (share - _WARMUP) / (1 - _WARMUP)))


def _fast_bfloat16(device: str) -> bool:
    return device != "cpu" or bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _copy(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def _restore(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
