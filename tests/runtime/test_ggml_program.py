"""The programs of a factored GGUF: what is written is read back, and nothing else is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgec import decompose
from edgec.contraction import Contraction, MatMul, Sum, core_shapes
from edgec.errors import CheckpointError
from edgec.fit import contraction_of
from edgec.records import Spec
from edgec.runtime.ggml import program
from edgec.runtime.ggml.program import Program, decode, encode


def programs() -> dict[str, Program]:
    """Every decomposition, of a matrix and of a table."""
    found = {}
    for role, shape in (("linear", (48, 32)), ("embedding", (96, 32))):
        for kind in decompose.kinds_of(role):
            specs = [Spec("dense")] if kind == "dense" else decompose.get(kind).exact(*shape)
            for number, spec in enumerate(specs):
                contraction = contraction_of(spec, shape, role)
                name = f"{role}.{kind}.{number}"
                found[name] = Program(contraction, {core: f"{name}.{core}" for core in core_shapes(contraction)})
    return found


def test_every_decomposition_comes_back() -> None:
    known = programs()
    assert decode(encode(known), "file") == known
    assert encode(decode(encode(known), "file")) == encode(known)


def sound() -> dict[str, Any]:
    return {"blk.0.ffn_up": {"out": 4, "in": 2, "cores": {"a": "t"}, "steps": [["matmul", "a", 4, 2]]}}


def test_the_example_of_the_hostile_cases_is_sound() -> None:
    found = decode(json.dumps(sound()), "file")["blk.0.ffn_up"]
    assert found.contraction == Contraction(4, 2, (MatMul("a", 4, 2),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": []}, "not empty"),
        ({"steps": [["matmul", "a", 4, 3]]}, "does not fit"),
        ({"steps": [["matmul", "a", 5, 2]]}, r"ends with trailing axes \(5,\)"),
        ({"steps": [["matmul", "a", 4, 2.0]]}, "whole number"),
        ({"steps": [["matmul", "a", True, 2]]}, "whole number"),
        ({"steps": [["matmul", "a", 4, -2]]}, "whole number"),
        ({"steps": [["matmul", "a", 1 << 40, 2]]}, "whole number"),
        ({"steps": [["matmul", 1, 4, 2]]}, "unknown step"),
        ({"steps": [["exec", "a", 4, 2]]}, "unknown step"),
        ({"steps": [["matmul", "a", 4, 2, 1]]}, "unknown step"),
        ({"steps": ["matmul"]}, "unknown step"),
        ({"steps": [["reshape", [1] * 9]]}, "unknown step"),
        ({"steps": [["reshape", [1, 1, 1, 2]]]}, "at most 3"),
        ({"steps": [["transpose", [0, 0]]]}, "does not fit"),
        ({"steps": [["reduce_sum", 0], ["reduce_sum", 0]]}, "does not fit"),
        ({"steps": [["sum", []]]}, "unknown step"),
        ({"steps": [["sum", [[["matmul", "a", 4, 2]]] * 17]]}, "unknown step"),
        ({"steps": [["scale", "a", 2]] * 300}, "more than 256"),
        ({"cores": {}}, "listed are"),
        ({"cores": {"a": 1}}, "names of tensors"),
        ({"cores": {"a": "t", "b": "u"}}, "listed are"),
        ({"extra": 1}, "expected the keys"),
        ({"out": "4"}, "whole number"),
    ],
)
def test_hostile_programs_are_refused_by_layer(change: dict[str, Any], message: str) -> None:
    record = sound()
    record["blk.0.ffn_up"] |= change
    with pytest.raises(CheckpointError, match=r"file: the program of layer 'blk\.0\.ffn_up'.*" + message):
        decode(json.dumps(record), "file")


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"a": NaN}', '{"a": {}, "a": {}}', "[" * 100_000, '{"a": 1}', " " * (program.MAX_BYTES + 1)],
    ids=["empty", "list", "NaN", "twice", "deep", "number", "long"],
)
def test_texts_that_are_no_programs(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"^file: "):
        decode(text, "file")


def test_sums_nested_too_deeply() -> None:
    step: list[Any] = ["matmul", "a", 4, 2]
    for _ in range(12):
        step = ["sum", [[step]]]
    record = sound()
    record["blk.0.ffn_up"]["steps"] = [step]
    with pytest.raises(CheckpointError, match="nested deeper"):
        decode(json.dumps(record), "file")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=20,
)


@given(JSON, st.sampled_from(["out", "in", "cores", "steps"]))
def test_anything_else_is_refused_or_read(value: Any, key: str) -> None:
    record = sound()
    record["blk.0.ffn_up"][key] = value
    try:
        found = decode(json.dumps(record), "file")["blk.0.ffn_up"].contraction
    except CheckpointError:
        return
    assert isinstance(found.steps[0], MatMul | Sum)
