"""GGUF files of a random-weight shape, their quantised blocks made at random and not quantised: seconds, not minutes.

Everything else is as in a real export: the same plan, the same names, programs and types, written by the same writers.
Only the numbers mean nothing, and they mean nothing in a shape's checkpoint either.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgec.bench import shapes
from edgec.bench.baselines import _llama_quantize
from edgec.checkpoint import open_checkpoint
from edgec.contraction import core_shapes
from edgec.errors import UsageError
from edgec.export.gguf import factored, stock
from edgec.export.gguf.plain import write_plain
from edgec.export.gguf.writer import GgufTensor, block_of, write_gguf
from edgec.export.targets import get_target
from edgec.fit import Core, Factors, contraction_of, core_formats
from edgec.gguf_header import read_header
from edgec.modeling import layers, skeleton
from edgec.outputs import staged_folder
from edgec.plan.planner import constrained_plan
from edgec.quantize.formats import LayerFormat
from edgec.quantize.ggml_formats import EXACT, GgmlFormat, GgmlTensor
from edgec.runtime import ggml
from edgec.runtime.llama_cpp import MODEL_FILE

Progress = Callable[[int, int], None]

TARGET = "gguf-factored"
_STD = 0.02
"""Standard deviation of a shape's weights, which random blocks keep."""


@dataclass(frozen=True)
class _Scale:
    """Where a block's fp16 scale and minimum lie [byte offset], and how far random codes spread for a scale of 1.

    centre: the minimum, as a multiple of the scale, at which the codes' values average 0; 0 for a type without one.
    """

    at: int
    deviation: float
    centre: float = 0.0


_SCALES: Mapping[str, _Scale] = {
    "Q4_0": _Scale(0, 4.61),
    "Q5_0": _Scale(0, 9.23),
    "Q8_0": _Scale(0, 73.9),
    "Q4_K": _Scale(0, 254.0, 7.5),
    "Q5_K": _Scale(0, 517.0, 15.5),
    "Q6_K": _Scale(208, 1366.0),
}
"""Types that llama.cpp mixes in the baselines; layouts as in ggml/src/ggml-common.h."""


def write_factored(model: Path, plan: str, out: Path, progress: Progress = lambda done, total: None) -> Path:
    """`edgec export --target gguf-factored --plan uniform:0.5` of a checkpoint's dimensions. Returns `out`.

    Raises UsageError for a plan that is no constraint or wants a format without random blocks, and what the export
    raises.
    """
    checkpoint = open_checkpoint(model)
    chosen = constrained_plan(plan, layers(skeleton(checkpoint)), get_target(TARGET), "")
    made: dict[str, Factors] = {}
    for choice in chosen.choices:
        contraction = contraction_of(choice.spec, choice.shape, choice.role)
        formats = core_formats(contraction, LayerFormat.parse(choice.format))
        cores: dict[str, Core] = {}
        for name, dims in core_shapes(contraction).items():
            kind = EXACT.get(str(formats[name]))
            if kind is None or kind not in _SCALES or len(dims) != 2:
                raise UsageError(f"--plan {plan}: {choice.layer} would hold {formats[name]}; expected uniform:RATIO")
            cores[name] = _core(f"{choice.layer}.{name}", (dims[0], dims[1]), kind)
        made[choice.layer] = Factors(contraction, cores)
    shared = {c.layer for c in chosen.choices if c.role != "embedding" and c.bytes == 0}
    draft = stock.draft(checkpoint)
    for layer in shared & set(draft.tied):
        made[layer] = made[draft.tied[layer]]
    with staged_folder(out) as stage:
        metadata, tensors = factored.contents(draft, made)
        factored.write(stage / ggml.MODEL_FILE, metadata, tensors, progress)
    return out


def write_quantised(
    shape: shapes.Shape, model: Path, kind: str, out: Path, progress: Progress = lambda done, total: None
) -> Path:
    """What llama.cpp's quantiser makes of a shape's checkpoint, "Q4_K_M" and the like; returns `out`.

    Which tensor gets which type is llama.cpp's own answer for a narrow twin of the shape: it goes by names, the number
    of layers, heads per KV head and whether rows divide into super-blocks, all of which the twin shares.
    """
    types = _types(shape, kind)
    checkpoint = open_checkpoint(model)
    draft = stock.draft(checkpoint)
    tensors = [_retyped(tensor, types.get(tensor.name, tensor.type)) for tensor in stock.tensors(draft, {})]
    with staged_folder(out) as stage:
        write_gguf(stage / MODEL_FILE, draft.metadata, tensors, progress)
    return out


def _types(shape: shapes.Shape, kind: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory(prefix="edgec-twin-") as room:
        folder = shapes.write(shapes.narrow(shape), Path(room) / "twin")
        source = write_plain(open_checkpoint(folder), Path(room) / "dense") / MODEL_FILE
        found = Path(room) / "quantised.gguf"
        _llama_quantize.quantise(source, found, kind)
        return {name: tensor.type_name for name, tensor in read_header(found).tensors.items()}


def _retyped(tensor: GgufTensor, kind: str) -> GgufTensor:
    if kind == tensor.type:
        return tensor
    rows, columns = tensor.shape
    return GgufTensor(tensor.name, tensor.shape, kind, lambda: random_blocks(tensor.name, (rows, columns), kind))


def _core(name: str, shape: tuple[int, int], kind: str) -> GgmlTensor:
    fmt = GgmlFormat.named(kind.lower())
    assert fmt is not None
    return GgmlTensor.of(fmt, shape, random_blocks(name, shape, kind))


def random_blocks(name: str, shape: tuple[int, int], kind: str, seed: int = 0) -> NDArray[np.uint8]:
    """A matrix [rows, columns] in blocks of `kind`, N(0, 0.02²) or nearly: uint8 [rows, row bytes].

    The same name and seed give the same bytes.
    """
    block, size = block_of(kind)
    rows, columns = shape
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    raw = np.frombuffer(generator.bytes(rows * columns // block * size), np.uint8).reshape(-1, size).copy()
    scale = _SCALES[kind]
    step = _STD / scale.deviation
    raw[:, scale.at : scale.at + 2] = _fp16(step)
    if scale.centre:
        raw[:, scale.at + 2 : scale.at + 4] = _fp16(step * scale.centre)
    return raw.reshape(rows, -1)


def _fp16(value: float) -> NDArray[np.uint8]:
    return np.frombuffer(np.array(value, "<f2").tobytes(), np.uint8)
