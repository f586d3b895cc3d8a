"""Which tensors a network has, of which shapes, and how the graphs read them. Everything about a file that ggml would
answer with an abort is refused here, before the first graph is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from edgec import limits
from edgec.contraction import (
    BlockMatMul,
    Gather,
    MatMul,
    Reshape,
    Scale,
    Step,
    Sum,
    core_shapes,
    flops,
    infer_shape,
    walk,
    widest,
)
from edgec.errors import CheckpointError
from edgec.gguf_header import GgufHeader
from edgec.runtime.ggml.bundles import Bundle, bundles
from edgec.runtime.ggml.config import Config, read_config
from edgec.runtime.ggml.library import BF16, F16, F32, ROPE_HALVES
from edgec.runtime.ggml.ops import node_count
from edgec.runtime.ggml.program import FORMAT, PROGRAMS_KEY, ROTATION_KEY, Program, decode
from edgec.runtime.ggml.weights import Use
from edgec.runtime.layout import FORMAT_KEY

TABLE, HEAD = "token_embd", "output"
SECONDS = ".second"
"""What the name of a bundle gets for its second cores."""
ROPE_FREQS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, [head / 2] float32 (Llama 3)."""
_LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_MOST_TIMES = 256
"""Operations of all programs, as a multiple of those of the whole matrices that they stand for; trains reach 90."""
_MOST_PER_BYTE = 16384
"""Operations per token and stored byte: 4 for a dense 4-bit layer, up to 3200 for trains of large matrices."""
_NODES_PER_BLOCK = 96
_NODES_AROUND = 64


@dataclass(frozen=True)
class Network:
    """What the graphs are built from: the config, the file's tensor names, the factored layers by name ("blk.0.attn_q",
    "token_embd", "output").
    """

    config: Config
    tensors: frozenset[str]
    programs: Mapping[str, Program]

    def linears(self) -> dict[str, tuple[int, int]]:
        """Every layer that multiplies, with its shape (out, in)."""
        c = self.config
        query = c.heads * c.head
        shapes = dict(
            zip(
                _LINEARS,
                (
                    (query, c.width),
                    (c.kv_width, c.width),
                    (c.kv_width, c.width),
                    (c.width, query),
                    (c.ffn, c.width),
                    (c.ffn, c.width),
                    (c.width, c.ffn),
                ),
                strict=True,
            )
        )
        found = {f"blk.{i}.{name}": shape for i in range(c.layers) for name, shape in shapes.items()}
        found[self.head] = (c.vocab, c.width)
        return found

    @property
    def head(self) -> str:
        """The layer that makes logits: the table where the file has no head of its own."""
        return HEAD if HEAD in self.programs or f"{HEAD}.weight" in self.tensors else TABLE

    @cached_property
    def bundles(self) -> dict[str, Bundle]:
        dense = [f"{name}.weight" for name in self.linears() if name not in self.programs]
        return bundles(self.programs, (*dense, *self.vectors()))

    def vectors(self) -> dict[str, int]:
        """Norms that must be there, with their sizes, and biases that the file has."""
        c = self.config
        block = {"attn_norm": c.width, "ffn_norm": c.width}
        if c.normed_heads:
            block |= {"attn_q_norm": c.head, "attn_k_norm": c.head}
        if c.post_norms:
            block |= {"post_attention_norm": c.width, "post_ffw_norm": c.width}
        found = {"output_norm.weight": c.width}
        found |= {f"blk.{i}.{name}.weight": n for i in range(c.layers) for name, n in block.items()}
        found |= {f"{n}.bias": s[0] for n, s in self.linears().items() if f"{n}.bias" in self.tensors}
        if ROPE_FREQS in self.tensors:
            found[ROPE_FREQS] = c.head // 2
        return found

    def uses(self) -> dict[str, Use]:
        """Every tensor that the graphs read, and how. A table's rows come from the file, see `Weights.rows`."""
        product, plain = set(), set(self.vectors())
        for name in self.linears():
            if name in self.programs:
                able, rest = _cores(self.programs[name])
                product |= able
                plain |= rest
            else:
                product.add(f"{name}.weight")
        if TABLE in self.programs:
            able, rest = _cores(self.programs[TABLE])
            product |= able
            plain |= rest
        return {name: Use(name in product, name in plain) for name in sorted(product | plain)}

    def nodes(self) -> int:
        """Most tensors of one graph."""
        factored = sum(node_count(program.contraction) for program in self.programs.values())
        return self.config.layers * _NODES_PER_BLOCK + _NODES_AROUND + factored


def _cores(program: Program) -> tuple[set[str], set[str]]:
    """Tensors that are multiplied with, and the others."""
    steps = list(walk(program.contraction.steps))
    able = {program.cores[s.core] for s in steps if isinstance(s, MatMul)}
    return able, {program.cores[s.core] for s in steps if isinstance(s, BlockMatMul | Gather | Scale)}


_FLOATS = frozenset({F32, F16, BF16})
_MATRICES = _FLOATS | {2, 3, 6, 7, 8, *range(10, 15), *range(16, 24), 29, 34, 35, 39}
"""Types that ggml multiplies with and takes rows of: floats and every quantised one that files are made of."""


def read_network(header: GgufHeader) -> Network:
    """The network of a file, checked. Raises CheckpointError or UnsupportedModelError."""
    programs: dict[str, Program] = {}
    rope = None
    if FORMAT_KEY in header.metadata:
        if (found := header.integer(FORMAT_KEY)) != FORMAT:
            raise CheckpointError(f"{header.path}: {FORMAT_KEY} {found}; this version of edgec reads {FORMAT}")
        programs = decode(header.text(PROGRAMS_KEY), header.path)
        if (layout := header.text(ROTATION_KEY)) != "halves":
            raise CheckpointError(f"{header.path}: {ROTATION_KEY} {layout!r}, expected 'halves'")
        rope = ROPE_HALVES
    network = Network(read_config(header, _rows(header, programs), rope), frozenset(header.tensors), programs)
    _check(network, header)
    return network


def _rows(header: GgufHeader, programs: Mapping[str, Program]) -> int:
    """Rows of the table, which must be one for each token that the file lists."""
    if TABLE in programs:
        rows = programs[TABLE].contraction.in_features
    elif (table := header.tensors.get(f"{TABLE}.weight")) is not None:
        rows = table.shape[0]
    else:
        raise CheckpointError(f"{header.path}: no {TABLE}.weight, and no program for it")
    if "tokenizer.ggml.tokens" in header.metadata and (tokens := len(header.strings("tokenizer.ggml.tokens"))) != rows:
        raise CheckpointError(f"{header.path}: a vocabulary of {tokens} tokens, a table of {rows} rows")
    return rows


def _check(network: Network, header: GgufHeader) -> None:
    linears = network.linears()
    for name, program in network.programs.items():
        found = program.contraction
        shape = (found.out_features, found.in_features)
        if name == TABLE:
            expected, lookup = (network.config.width, network.config.vocab), True
        elif name in linears:
            expected, lookup = linears[name], False
        else:
            raise CheckpointError(f"{header.path}: a program for {name[:80]!r}, which this network does not have")
        if shape != expected or found.lookup != lookup:
            raise CheckpointError(f"{header.path}: the program of {name!r} makes {shape}, the network needs {expected}")
        _check_program(name, program, header)
    if network.head == TABLE and TABLE in network.programs:
        raise CheckpointError(f"{header.path}: its table is factored, so it needs a head of its own ({HEAD})")
    for name, expected in linears.items():
        if name not in network.programs:
            _require(header, f"{name}.weight", expected, _MATRICES)
    if TABLE not in network.programs:
        _require(header, f"{TABLE}.weight", (network.config.vocab, network.config.width), _MATRICES)
    for name, size in network.vectors().items():
        _require(header, name, (size,), frozenset({F32}))
    if taken := sorted(network.tensors & {f"{name}{end}" for name in network.bundles for end in ("", SECONDS)}):
        raise CheckpointError(f"{header.path}: the tensor {taken[0]!r} has a name that stands for several")
    _check_work(network, header)


def _check_work(network: Network, header: GgufHeader) -> None:
    """Programs may take more operations than the matrices that they stand for (trains of many small cores do), but
    neither many times more nor out of all proportion to the file. Raises CheckpointError.
    """
    programs = [program.contraction for program in network.programs.values()]
    work = sum(flops(program) + _moved(program.steps, program.start)[0] for program in programs)
    whole = sum(2 * out * in_ for out, in_ in network.linears().values())
    stored = sum(tensor.nbytes for tensor in header.tensors.values())
    if work > _MOST_TIMES * whole or work > _MOST_PER_BYTE * stored:
        raise CheckpointError(f"{header.path}: {work:.2g} operations a token, far too many for what it computes")


def _moved(steps: Sequence[Step], trailing: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Numbers that one token's steps write, products left out, and the shape that they end with."""
    moved = 0
    for step in steps:
        if isinstance(step, Sum):
            for branch in step.branches:
                inside, end = _moved(branch, trailing)
                moved += inside + prod(end)
        trailing = infer_shape((step,), trailing)
        if not isinstance(step, MatMul | BlockMatMul | Reshape):
            moved += prod(trailing)
    return moved, trailing


def _check_program(name: str, program: Program, header: GgufHeader) -> None:
    shapes = core_shapes(program.contraction)
    if (most := widest(program.contraction)) > limits.MAX_DIMENSION:
        raise CheckpointError(f"{header.path}: the program of {name!r} makes {most} numbers of one token")
    for step in walk(program.contraction.steps):
        if isinstance(step, MatMul | Gather):
            types = _MATRICES
        elif isinstance(step, BlockMatMul):
            types = frozenset({F32, F16})
        elif isinstance(step, Scale):
            types = frozenset({F32})
        else:
            continue
        if isinstance(step, Gather) and step.v < program.contraction.in_features:
            raise CheckpointError(f"{header.path}: {name!r} looks ids up in a core of only {step.v} rows")
        _require(header, program.cores[step.core], shapes[step.core], types)


def _require(header: GgufHeader, name: str, shape: tuple[int, ...], types: frozenset[int]) -> None:
    info = header.tensors.get(name)
    if info is None:
        raise CheckpointError(f"{header.path}: tensor {name[:80]!r} is missing")
    if info.shape != shape or info.type not in types:
        raise CheckpointError(
            f"{header.path}: tensor {name!r} is {info.type_name} {list(info.shape)}; expected {list(shape)} of a type "
            f"that ggml computes with here"
        )
