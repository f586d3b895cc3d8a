"""An interrupted healing run on disk: one safetensors file, replaced as a whole at every check."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgec.outputs import written_file

logger = logging.getLogger(__name__)

_NUMBERS = ("best_value", "best_step", "step", "seconds", "damping")


@dataclass(frozen=True)
class RunState:
    """key: what the run is of. best: every trained parameter at the lowest held-out divergence `best_value`.
    points: (seconds, step, divergence) so far. damping: factor on the learning rate after divergences.
    """

    key: str
    best: Sequence[Tensor]
    best_value: float
    points: list[tuple[float, int, float]] = field(default_factory=list)
    best_step: int = 0
    step: int = 0
    seconds: float = 0.0
    damping: float = 1.0


def save_state(
    file: Path, state: RunState, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Whole or not at all; an older file is replaced."""
    tensors: dict[str, Tensor] = {}
    for index, (parameter, best) in enumerate(zip(parameters, state.best, strict=True)):
        tensors[f"now.{index}"] = parameter.detach().contiguous()
        tensors[f"best.{index}"] = best.contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{index}.{key}"] = value.detach().clone().contiguous()
    told = {"points": state.points, **{name: getattr(state, name) for name in _NUMBERS}}
    with written_file(file) as temporary:
        save_file(tensors, temporary, metadata={"key": state.key, "state": json.dumps(told)})


@torch.no_grad()
def load_state(
    file: Path, key: str, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> RunState | None:
    """Puts parameters and optimizer where the run stopped. None where there is no file, or one of another run (which
    is said).
    """
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("key") != key:
                logger.warning(
                    "%s is of another run (edgec, model, plan, text or settings changed); healing starts anew", file
                )
                return None
            told = json.loads(metadata["state"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  not a dict
        best = [tensors[f"best.{index}"].reshape(p.shape).to(p.device) for index, p in enumerate(parameters)]
        now = [tensors[f"now.{index}"].reshape(p.shape) for index, p in enumerate(parameters)]
        points = [(float(s), int(n), float(v)) for s, n, v in told["points"]]
        state = RunState(key, best, points=points, **{name: told[name] for name in _NUMBERS})
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        logger.warning("%s cannot be read (%s); healing starts anew", file, error)
        return None
    for index, (parameter, value) in enumerate(zip(parameters, now, strict=True)):
        parameter.copy_(value)
        prefix = f"adam.{index}."
        if adam := {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}:
            optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in adam.items()}
    return state
