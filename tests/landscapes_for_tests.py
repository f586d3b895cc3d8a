"""Made-up models whose true loss differs from the predicted one in a known way: what searches are held to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from edgec.export.targets import get_target
from edgec.fit import stored_bytes
from edgec.modeling import Layer
from edgec.plan.candidates import candidates
from edgec.plan.corrections import block_of, form_of, predicted
from edgec.plan.planner import Sizes, make_choice
from edgec.quantize.formats import CoreFormat
from edgec.records import Choice, LayerProfile, Target

X64 = get_target("onnx-x64")
BLOCKS = 4
LAYERS = [
    Layer("embed", "embedding", (512, 128)),
    *(
        Layer(f"block.{i}.{n}", "linear", s)
        for i in range(BLOCKS)
        for n, s in (("q", (128, 128)), ("up", (256, 128)), ("down", (128, 256)))
    ),
    Layer("head", "head", (512, 128), tied_to="embed"),
]
LINEAR_PARAMETERS = BLOCKS * (128 * 128 + 2 * 128 * 256)
SIZES = Sizes(512 * 128 + LINEAR_PARAMETERS, other_bytes=10_000)


@dataclass(frozen=True)
class Made:
    fingerprint: str
    layers: tuple[LayerProfile, ...]


def profile(target: Target = X64) -> Made:
    """Losses that fall with bits and with the parameters kept, as real ones do."""
    made = []
    for number, layer in enumerate(LAYERS):
        offered = candidates([target], layer.role, layer.shape, tied=layer.tied_to is not None)
        scored = tuple(_scored(make_choice(layer, spec, fmt), 1.0 + number % 5) for spec, fmt in offered)
        made.append(LayerProfile(layer.name, layer.role, layer.shape, {}, {}, (), False, layer.tied_to, scored))
    return Made("sha256:x", tuple(made))


def _scored(choice: Choice, weight: float) -> Choice:
    if "+" in choice.format:  # a coarse backbone with something finer beside it
        bits, kept = 3.0, 1.0
    else:
        bits = float(CoreFormat.parse(choice.format).bits)
        size = stored_bytes(choice.spec, choice.shape, choice.role, CoreFormat(32))
        kept = size / (4 * choice.shape[0] * choice.shape[1])
    block = int(choice.format.partition("-b")[2].partition("+")[0] or 32)
    loss = weight * 1e-2 * (4.0**-bits * 4 * (1 + block / 128) + 0.3 * max(0.0, 1 - kept) ** 2)
    return replace(choice, loss=loss, error=0.1)


def truth(
    form: dict[str, float] | None = None, depth: dict[int, float] | None = None, overlap: float = 0.0
) -> Callable[[list[Choice]], float]:
    """Measured loss: predicted ones times a factor by form and by block, then raised to 1 + overlap."""

    def evaluate(choices: list[Choice]) -> float:
        total = 0.0
        for choice in choices:
            block = block_of(choice.layer)
            factor = (form or {}).get(form_of(choice), 1.0) * (depth or {}).get(-1 if block is None else block, 1.0)
            total += factor * predicted(choice)
        return math.pow(total, 1 + overlap)

    return evaluate
