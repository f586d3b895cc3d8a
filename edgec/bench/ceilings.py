"""A device's ceilings, asked before and after a bench, and how near each causal LM comes to that of its decoding.

The worker measures (`edgec.bench.roofline`); here its job is made, its answer is read, and the artifact's own bytes
(`edgec.bench.reads`) are put beside it. A roofline from a data sheet was turned down: what a virtual machine or a phone
gets of its memory is not what is printed there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgec.bench.devices import Device
from edgec.bench.jobs import Answers, Job
from edgec.bench.reads import Reads
from edgec.bench.roofline import ROOFLINE, ROWS
from edgec.errors import EdgecError
from edgec.records import Roofline

READ, INTEGER = "read_bytes_s", "integer_op_s"
"""Names of ceilings: bytes per second read from memory by all threads of the bench; integer operations per second."""

_KINDS = ("local", "ssh", "adb")
"""Devices whose models run from the memory that a reading processor core measures."""
_SIDE = 2048
"""Of the square integer products [count]."""
_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Ceilings:
    """values: `read_bytes_s`, the same with one thread, `integer_op_s`, as far as they are known. problem: why not."""

    values: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""

    def or_higher(self, other: Ceilings) -> Ceilings:
        """The higher of each: what was reached once can be reached. What `other` could not find does not count."""
        names = {**self.values, **other.values}
        best = {name: max(self.values.get(name, 0.0), other.values.get(name, 0.0)) for name in names}
        return Ceilings(best, "" if best else self.problem)


def ask(device: Device, threads: int) -> Ceilings:
    """Measures the device with so many threads. Never raises: a bench without a roofline is still a bench."""
    kind = device.name.partition(":")[0]
    if kind not in _KINDS or not device.timed:
        return Ceilings(problem=f"no roofline: the memory that a {kind} device runs models from is not measured")
    answers = Answers()
    try:
        with tempfile.TemporaryDirectory(prefix="edgec-roofline-") as room:
            operations = write_products(Path(room))
            job = Job(folder=str(Path(room).resolve()), task=ROOFLINE, threads=threads, samples=0)
            done = device.measure(job, timeout_s=_TIMEOUT_S, on_line=lambda line: answers.take(line, job))
    except EdgecError as error:
        return Ceilings(problem=f"no roofline: {error}")
    told = answers.ceilings
    if f"{READ}_{threads}" not in told:
        return Ceilings(problem=f"no roofline: {answers.error or answers.problem or done.reason()}")
    values = {READ: told[f"{READ}_{threads}"], f"{READ}_one_thread": told.get(f"{READ}_1", told[f"{READ}_{threads}"])}
    rates = [count / told[f"run_s_{name}"] for name, count in operations.items() if f"run_s_{name}" in told]
    return Ceilings({**values, INTEGER: max(rates)} if rates else values)


def place(reads: Reads, tokens: float, read_bytes_s: float, decode_tok_s: float) -> Roofline:
    """Where a measured rate lies under the limit; tokens: that a step looks back on, on average."""
    limit = read_bytes_s / reads.at(tokens)
    return Roofline(
        weight_bytes=reads.weight_bytes,
        cache_bytes=round(reads.cache_bytes * tokens),
        read_bytes_s=read_bytes_s,
        limit_tok_s=limit,
        distance=limit / decode_tok_s,
    )


def write_products(folder: Path) -> dict[str, int]:
    """Integer products of ROWS rows with a large matrix; name → operations (a multiplication and an addition each).

    int8 × int8 as onnxruntime's quantiser writes it, and the 4- and 8-bit weights that edgec exports, whose kernels
    compute in int8 too: which is the fastest differs between processors.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)

    def save(name: str, kind: int, node: Any, out: int, constants: Mapping[str, Any]) -> None:
        graph = helper.make_graph(
            [node],
            name,
            [helper.make_tensor_value_info("x", kind, ["rows", _SIDE])],
            [helper.make_tensor_value_info("y", out, ["rows", _SIDE])],
            [numpy_helper.from_array(array, key) for key, array in constants.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(folder / f"{name}.onnx"))

    square = generator.integers(-127, 128, (_SIDE, _SIDE), np.int8)
    save(
        "int8",
        TensorProto.UINT8,
        helper.make_node("MatMulInteger", ["x", "w"], ["y"]),
        TensorProto.INT32,
        {"w": square},
    )
    for bits, block in ((4, 32), (8, 32)):
        codes = generator.integers(0, 256, (_SIDE, _SIDE // block, block * bits // 8), np.uint8)
        constants = {"codes": codes, "scales": np.full((_SIDE, _SIDE // block), 0.01, np.float32)}
        node = helper.make_node(
            "MatMulNBits",
            ["x", "codes", "scales"],
            ["y"],
            domain="com.microsoft",
            K=_SIDE,
            N=_SIDE,
            bits=bits,
            block_size=block,
            accuracy_level=4,
        )
        save(f"nbits{bits}", TensorProto.FLOAT, node, TensorProto.FLOAT, constants)
    return dict.fromkeys(("int8", "nbits4", "nbits8"), 2 * ROWS * _SIDE * _SIDE)
