"""How many bytes one decode step of an artifact reads, from the artifact's own files; no tensor is loaded.

Every weight that a step multiplies with counts once, as its runtime holds it: a table that is only looked up counts
one row, a tied one counts whole (the head multiplies with it), fp16 numbers that the graph casts to fp32 count four
bytes, since onnxruntime casts constants once and keeps the result. The cache counts as far as it is filled. What a
runtime adds by packing (sums of blocks, padding) is not known from outside and not counted; activations are not
either. A graph whose steps read a varying part of the weights (experts) is refused rather than guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgec import limits
from edgec.bench.sizes import ADAPTER_FILE, model_file
from edgec.contraction import Gather, walk
from edgec.errors import BenchError, CheckpointError, EdgecError
from edgec.gguf_header import GgufHeader, read_header
from edgec.runtime.ggml.network import HEAD, TABLE
from edgec.runtime.ggml.program import PROGRAMS_KEY, decode
from edgec.runtime.layout import optional_json

if TYPE_CHECKING:
    import onnx_ir as ir

CACHE_BYTES: Mapping[str, tuple[int, int]] = {"f32": (1, 4), "f16": (1, 2), "q8_0": (32, 34)}
"""GGUF runtimes' cache types: numbers per block, bytes per block."""

_MICROSOFT = "com.microsoft"
_ROWS = {
    ("", "Gather", 0),
    (_MICROSOFT, "GatherBlockQuantized", 0),
    (_MICROSOFT, "GatherBlockQuantized", 2),
    (_MICROSOFT, "GatherBlockQuantized", 3),
    (_MICROSOFT, "GroupQueryAttention", 7),
    (_MICROSOFT, "GroupQueryAttention", 8),
    (_MICROSOFT, "RotaryEmbedding", 2),
    (_MICROSOFT, "RotaryEmbedding", 3),
    ("", "RotaryEmbedding", 1),
    ("", "RotaryEmbedding", 2),
}
"""(domain, operator, input) of which a step reads one row."""
_FOLDED = {"Cast", "Reshape", "Transpose", "Identity", "Unsqueeze", "Squeeze", "Slice"}
"""Operators on constants that onnxruntime computes when it loads; what counts is who reads their output."""
_DEEPEST = 8
_EXPERTS = {"MoE", "QMoE", "If", "Loop", "Scan"}


@dataclass(frozen=True)
class Reads:
    """Of one decode step. weight_bytes: see above. cache_bytes: keys and values of one token, all layers."""

    weight_bytes: int
    cache_bytes: float

    def at(self, tokens: float) -> float:
        """Bytes of a step that looks back on so many tokens. Windows of attention are not subtracted: edgec's runtimes
        keep the whole cache and mask it.
        """
        return self.weight_bytes + self.cache_bytes * tokens


def reads_of(folder: Path, kv: str = "f16") -> Reads:
    """Of a causal LM's folder. kv: the cache type that a GGUF runs with; ONNX graphs state their own.

    Raises BenchError saying why where the files do not tell.
    """
    path = model_file(folder)
    try:
        return _of_gguf(folder, path, kv) if path.suffix == ".gguf" else _of_onnx(path)
    except BenchError:
        raise
    except EdgecError as error:
        raise BenchError(str(error)) from error


def _of_gguf(folder: Path, path: Path, kv: str) -> Reads:
    header = read_header(path)
    if header.integer(f"{header.architecture}.expert_count", 0):
        raise BenchError("a mixture of experts reads another part of its weights at every step")
    looked_up = _looked_up(header)
    total = sum(t.nbytes // t.shape[0] if t.name in looked_up else t.nbytes for t in header.tensors.values())
    if (folder / ADAPTER_FILE).is_file():
        total += sum(tensor.nbytes for tensor in read_header(folder / ADAPTER_FILE).tensors.values())
    return Reads(total, _gguf_cache(header, kv))


def _looked_up(header: GgufHeader) -> set[str]:
    """Tensors of which a step reads one row: the table, whole or in cores, where the head is not made of it too."""
    programs = decode(header.text(PROGRAMS_KEY, "{}"), header.path)
    if HEAD not in programs and f"{HEAD}.weight" not in header.tensors:
        return set()
    rows, whole = {f"{TABLE}.weight"}, set[str]()
    for program in programs.values():
        for step in walk(program.contraction.steps):
            core = getattr(step, "core", None)
            if core is not None:
                (rows if isinstance(step, Gather) else whole).add(program.cores[core])
    return rows - whole


def _gguf_cache(header: GgufHeader, kv: str) -> float:
    """Bytes per token. Heads may be one number for all layers, or one per layer."""
    name, (block, size) = header.architecture, CACHE_BYTES[kv]
    layers = header.integer(f"{name}.block_count", low=1, high=limits.MAX_LAYERS)
    heads = _heads(header, f"{name}.attention.head_count", layers)
    kv_heads = _heads(header, f"{name}.attention.head_count_kv", layers, heads)
    width = header.integer(f"{name}.embedding_length", low=1)
    usual = width // max(1, *heads)
    key = header.integer(f"{name}.attention.key_length", usual, low=1)
    value = header.integer(f"{name}.attention.value_length", usual, low=1)
    return sum(kv_heads) * (key + value) * size / block


def _heads(header: GgufHeader, key: str, layers: int, default: list[int] | None = None) -> list[int]:
    if key not in header.metadata and default is not None:
        return default
    if isinstance(header.metadata.get(key), np.ndarray):
        found = header.numbers(key)
        whole = found.dtype.kind in "iu" and len(found) == layers
        if not whole or found.min() < 0 or found.max() > limits.MAX_DIMENSION:
            raise CheckpointError(f"{header.path}: {key} is not a count of heads for each of {layers} layers")
        return [int(n) for n in found]
    return [header.integer(key, low=1)] * layers


def _of_onnx(path: Path) -> Reads:
    import onnx_ir as ir

    try:
        graph = ir.load(path).graph
    except Exception as error:  # protobuf's DecodeError, ValueError and more, depending on what is broken
        raise BenchError(f"{path} cannot be read as ONNX: {error}") from error
    if found := sorted({node.op_type for node in graph} & _EXPERTS):
        raise BenchError(f"its graph has {found[0]}: what a step reads depends on the input")
    total = sum(_step_bytes(value) for value in graph.initializers.values())
    head_size = _head_size(path.parent)
    past = [value for value in graph.inputs if (value.name or "").startswith("past_key_values.")]
    cache = sum(_past(value, head_size) for value in past)
    if not cache:
        raise BenchError("its graph has no past_key_values: it is not a decoder that keeps a cache")
    return Reads(round(total), cache)


def _head_size(folder: Path) -> object:
    """What genai_config.json says, whatever it is."""
    model = optional_json(folder / "genai_config.json").get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    return decoder.get("head_size") if isinstance(decoder, dict) else None


def _held(value: ir.Value, bits: float, depth: int = 0) -> dict[float, bool]:
    """How the runtime holds a constant: bits per element → is it multiplied with (or only looked up)?

    A tied table that is looked up transposed is held twice, but only one of the two is multiplied with.
    """
    if depth > _DEEPEST:
        raise BenchError(f"initializer {value.name!r} passes through more than {_DEEPEST} operators before it is used")
    found: dict[float, bool] = {}
    for node, index in value.uses():
        if node.op_type in _FOLDED and index == 0:
            cast = node.attributes.get("to") if node.op_type == "Cast" else None
            width = float(_bitwidth(cast.as_int())) if cast is not None else bits
            below = [pair for output in node.outputs for pair in _held(output, width, depth + 1).items()]
        else:
            below = [(bits, (node.domain, node.op_type, index) not in _ROWS)]
        for held, multiplied in below:
            found[held] = found.get(held, False) or multiplied
    return found


def _bitwidth(kind: int) -> int:
    import onnx_ir as ir

    try:
        return ir.DataType(kind).bitwidth
    except (ValueError, TypeError) as error:
        raise BenchError(f"the graph casts a constant to type {kind}, which has no size") from error


def _step_bytes(value: ir.Value) -> float:
    """What a step reads of one initializer."""
    tensor = value.const_value
    if tensor is None:
        raise BenchError(f"initializer {value.name!r} has no tensor")
    shape = [int(d) for d in tensor.shape.numpy()]
    total = 0.0
    for bits, multiplied in _held(value, float(tensor.dtype.bitwidth)).items():
        size = prod(shape) * bits / 8
        total += size if multiplied else size / max(1, shape[0] if shape else 1)
    return total


def _past(value: ir.Value, head_size: object) -> float:
    """One input [batch, heads, past, head_dim]: bytes per token. genai's builder leaves head_dim to its config."""
    shape = value.shape
    if shape is None or len(shape) != 4 or value.dtype is None:
        raise BenchError(f"the graph's cache input {value.name!r} does not say its shape")
    heads, width = shape[1], shape[3] if isinstance(shape[3], int) else head_size
    if type(heads) is not int or type(width) is not int or not 0 < heads * width <= limits.MAX_DIMENSION:
        raise BenchError(f"the graph's cache input {value.name!r} does not say its heads or their size")
    return heads * width * value.dtype.bitwidth / 8
