"""A model whose layers stay factored, as one GGUF file that `edgec.runtime.ggml` runs (docs/gguf-factored.md).

Cores ship as they were quantised and healed: int4-b32 as Q4_0 and int8-b32 as Q8_0, number for number. Queries and keys
keep transformers' order of rows, and the file says so: llama.cpp's own order would have to be pushed through a
contraction, and not every one has a core whose rows are the outputs. The file's architecture is llama.cpp's, so that
it reads the vocabulary; for the blocks it needs weights that are not there, and says so.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec.contraction import Contraction, Gather, MatMul, Scale, walk
from edgec.errors import ExportError
from edgec.export.gguf import stock
from edgec.export.gguf.metadata import ROPE_FREQS, Value, norm_offset, rope_divisors
from edgec.export.gguf.writer import GgufTensor, tensor_of, write_gguf
from edgec.fit import Core, Factors
from edgec.gguf_header import GgufHeader, read_header
from edgec.quantize.formats import QuantizedTensor
from edgec.runtime.ggml.bundles import file_order
from edgec.runtime.ggml.model import GgmlModel
from edgec.runtime.ggml.program import (
    FORMAT,
    PROGRAMS_KEY,
    ROTATION_KEY,
    SELFTEST_IDS,
    SELFTEST_LOGITS,
    SELFTEST_TOKENS,
    Program,
    encode,
)
from edgec.runtime.layout import FORMAT_KEY
from edgec.runtime.options import RuntimeOptions

Progress = Callable[[int, int], None]

_PROBE_IDS, _PROBE_TOKENS = 8, 64
"""Length of the self-test's text, and of how many tokens its logits are kept."""


def contents(draft: stock.Draft, factors: Mapping[str, Factors]) -> tuple[dict[str, Value], list[GgufTensor]]:
    """Metadata and tensors of the file. The logits of the self-test are still zero.

    Raises ExportError for a core that no ggml type holds exactly.
    """
    found: list[GgufTensor] = []
    programs: dict[str, Program] = {}
    owners: dict[int, str] = {}

    def place(name: str, core: Core) -> str:
        """The tensor that holds a core: another layer's where both store the same one."""
        if id(core) not in owners:
            owners[id(core)] = name
            found.append(tensor_of(name, core))
        return owners[id(core)]

    for layer, fitted in sorted(factors.items(), key=lambda entry: not entry[1].contraction.lookup):
        name = _name(draft, layer)
        if _whole(fitted.contraction):
            (core,) = fitted.cores.values()
            if layer not in draft.tied or id(core) not in owners:
                place(f"{name}.weight", core)
        else:
            vectors = {step.core for step in walk(fitted.contraction.steps) if isinstance(step, Scale)}
            cores = {n: _widened(core) if n in vectors else core for n, core in fitted.cores.items()}
            places = {n: place(f"{name}.edgec.{n}", core) for n, core in cores.items()}
            programs[name] = Program(fitted.contraction, places)
    found += _rest(draft, factors)
    tensors = {tensor.name: tensor for tensor in found}
    return _metadata(draft, programs), [tensors[name] for name in file_order(list(tensors), programs)]


def write(path: Path, metadata: Mapping[str, Value], tensors: list[GgufTensor], progress: Progress) -> dict[str, int]:
    """The file with its self-test: written, run once, and the logits put where zeros were. Returns tensor → bytes."""
    sizes = write_gguf(path, metadata, tensors, progress)
    header = read_header(path)
    model = GgmlModel(path, RuntimeOptions(threads=1), selftest=False)
    logits = model.logits(header.numbers(SELFTEST_IDS))[-1][header.numbers(SELFTEST_TOKENS)]
    del model
    _patch(path, header, logits)
    return sizes


def _metadata(draft: stock.Draft, programs: Mapping[str, Program]) -> dict[str, Value]:
    vocab = int(draft.config.vocab_size)
    generator = np.random.default_rng(0)
    tokens = np.unique(np.linspace(0, vocab - 1, _PROBE_TOKENS).astype(int)).tolist()
    return {
        **draft.metadata,
        FORMAT_KEY: FORMAT,
        ROTATION_KEY: "halves",
        PROGRAMS_KEY: encode(programs),
        SELFTEST_IDS: generator.integers(0, vocab, _PROBE_IDS).tolist(),
        SELFTEST_TOKENS: tokens,
        SELFTEST_LOGITS: [0.0] * len(tokens),
    }


def _rest(draft: stock.Draft, factors: Mapping[str, Factors]) -> list[GgufTensor]:
    """What no plan replaced: vectors as F32, matrices as F16; a head of its own where its table is factored."""
    found = []
    tables = {table: head for head, table in draft.tied.items()}
    for name, place in draft.places.items():
        layer = place.removesuffix(".weight")
        head = tables.get(layer)
        if layer not in factors:
            if layer not in draft.tied:
                found.append(_plain(draft, name, draft.names.of(place), place))
        elif head is not None and head not in factors and not _whole(factors[layer].contraction):
            found.append(_plain(draft, name, "output.weight", place))
    divisors = rope_divisors(draft.config)
    if divisors is not None:
        found.append(tensor_of(ROPE_FREQS, divisors))
    return found


def _plain(draft: stock.Draft, name: str, tensor: str, place: str) -> GgufTensor:
    shape = draft.checkpoint.tensors[name].shape
    offset = norm_offset(draft.architecture) if place.endswith("norm.weight") else 0.0
    dtype: Any = np.float32 if len(shape) == 1 else np.float16

    def data() -> NDArray[Any]:
        values = np.asarray(draft.checkpoint.read(name), np.float32) + np.float32(offset)
        return np.ascontiguousarray(values, dtype)

    return GgufTensor(tensor, shape, "F32" if dtype is np.float32 else "F16", data)


def _name(draft: stock.Draft, layer: str) -> str:
    """ "model.layers.0.self_attn.q_proj" → "blk.0.attn_q"; a tied head is "output", which llama.cpp may not list."""
    return "output" if layer in draft.tied else draft.names.of(f"{layer}.weight").removesuffix(".weight")


def _whole(contraction: Contraction) -> bool:
    """Is the layer one matrix, multiplied with or looked up in?"""
    return len(contraction.steps) == 1 and isinstance(contraction.steps[0], MatMul | Gather)


def _widened(core: Core) -> Core:
    """ggml multiplies element by element in F32 only."""
    if isinstance(core, QuantizedTensor):
        raise ExportError("a diagonal core is quantised; ggml scales by floats")
    return core.astype(np.float32)


def _patch(path: Path, header: GgufHeader, logits: NDArray[np.float32]) -> None:
    """Put the self-test's logits into the finished header: an array's bytes follow its key, its type (4 bytes), its
    elements' type (4) and its length (8).
    """
    key = SELFTEST_LOGITS.encode()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), header.data_start) as head:
        at = head.find(key) + len(key) + 16
        wanted = logits.astype("<f4").tobytes()
        if head.find(key, at) >= 0 or head[at : at + len(wanted)] != bytes(len(wanted)):
            raise ExportError(f"{path}: the place of {SELFTEST_LOGITS} in the header is not where it should be")
        head[at : at + len(wanted)] = wanted
