"""model.onnx and its data: equal tensors once, the same bytes twice, a graph that stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs_for_tests import LAYER, linear_graph, model_of, run_graph, session, table_graph, value
from graphs_for_tests import constant as constant_value

from edgec.export.onnx.lowering import lower
from edgec.export.onnx.saving import DATA_FILE, MODEL_FILE, save_model
from edgec.fit import fit
from edgec.quantize.formats import CoreFormat
from edgec.records import Spec


def weight(out: int = 48, in_: int = 64, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((out, in_)).astype(np.float32)


def summing(arrays: list[np.ndarray[Any, Any]]) -> ir.Model:
    """x + every array, each an initializer of its own name."""
    x = value("x", ir.DataType.FLOAT, list(arrays[0].shape))
    weights = [constant_value(f"w{i}", array) for i, array in enumerate(arrays)]
    nodes: list[ir.Node] = []
    total = x
    for number, held in enumerate(weights):
        nodes.append(ir.node("Add", [total, held], name=f"add{number}"))
        total = nodes[-1].outputs[0]
        total.name, total.dtype, total.shape = f"sum{number}", ir.DataType.FLOAT, x.shape
    total.name = "y"
    return model_of([x], nodes, total, weights)


def places(folder: Path) -> dict[str, tuple[int, int]]:
    """Initializer → (offset, length) in the data file."""
    found = {}
    for tensor in onnx.load(folder / MODEL_FILE, load_external_data=False).graph.initializer:
        if tensor.external_data:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == DATA_FILE
            found[tensor.name] = (int(entries["offset"]), int(entries["length"]))
    return found


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    one, other = weight(), weight(seed=1)
    sizes = save_model(summing([one, other, one.copy()]), tmp_path)
    assert sizes == {"w0": one.nbytes, "w1": one.nbytes, "w2": 0}
    found = places(tmp_path)
    assert found["w0"] == found["w2"] != found["w1"]
    x = weight(seed=2)
    result = session(summing([one, other, one.copy()]), tmp_path).run(None, {"x": x})[0]
    np.testing.assert_allclose(result, x + 2 * one + other, rtol=1e-5, atol=1e-5)


def test_one_range_serves_both_layouts(tmp_path: Path) -> None:
    """A tied table: [v, blocks, bytes] for MatMulNBits, [v, blocks · bytes] for GatherBlockQuantized."""
    codes = np.random.default_rng(0).integers(0, 255, (64, 4, 16)).astype(np.uint8)
    ids = value("x", ir.DataType.INT64, [1])
    first, second = constant_value("a", codes), constant_value("b", codes.reshape(64, -1))
    nodes = [ir.node("Gather", [first, ids]), ir.node("Gather", [second, ids])]
    flat = ir.node("Flatten", [nodes[0].outputs[0]])
    same = ir.node("Equal", [flat.outputs[0], nodes[1].outputs[0]])
    same.outputs[0].name, same.outputs[0].dtype, same.outputs[0].shape = "y", ir.DataType.BOOL, ir.Shape([1, 64])
    model = model_of([ids], [*nodes, flat, same], same.outputs[0], [first, second])
    assert sorted(save_model(model, tmp_path).values()) == [0, codes.nbytes]
    assert len(set(places(tmp_path).values())) == 1
    assert session(model, tmp_path).run(None, {"x": np.array([7])})[0].all()


def test_the_same_model_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        big = weight(256, 256)
        graph = linear_graph(big)
        lower(graph, {LAYER: fit(big, Spec("svd", (64,)), CoreFormat.parse("int4-b32"))}, accuracy_level=4)
        (tmp_path / name).mkdir()
        save_model(graph.model, tmp_path / name)
    for file in (MODEL_FILE, DATA_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "a" / MODEL_FILE).read_bytes()


def test_little_is_lost_to_alignment(tmp_path: Path) -> None:
    large, small = weight(512, 600), weight(512, 20)
    arrays = [small, large] * 2 + [weight(512, 20, seed) for seed in range(3, 40)]
    shapes = [ir.Shape(a.shape) for a in arrays]
    x = value("x", ir.DataType.FLOAT, ["n"])
    weights = [constant_value(f"w{i}", array) for i, array in enumerate(arrays)]
    nodes = [ir.node("Shape", [held]) for held in weights]
    joined = ir.node("Concat", [n.outputs[0] for n in nodes], attributes={"axis": 0})
    joined.outputs[0].name, joined.outputs[0].dtype = "y", ir.DataType.INT64
    joined.outputs[0].shape = ir.Shape([2 * len(shapes)])
    sizes = save_model(model_of([x], [*nodes, joined], joined.outputs[0], weights), tmp_path)
    found = places(tmp_path)
    assert (tmp_path / DATA_FILE).stat().st_size <= sum(sizes.values()) + 4096 + 64 * len(arrays)
    assert found["w1"][0] % 4096 == 0  # 1.2 MB: may be mapped
    assert all(offset % 64 == 0 for offset, _ in found.values())
    spans = sorted(set(found.values()))
    assert all(a + length <= b for (a, length), (b, _) in zip(spans, spans[1:], strict=False))


def test_small_tensors_stay_inside_and_leave_no_empty_file(tmp_path: Path) -> None:
    tiny = np.ones((2, 3), np.float32)
    assert save_model(summing([tiny]), tmp_path) == {"w0": 24}
    assert [p.name for p in tmp_path.iterdir()] == [MODEL_FILE]
    np.testing.assert_array_equal(run_graph(summing([tiny]), tmp_path, tiny), 2 * tiny)


def test_progress_and_the_model_afterwards(tmp_path: Path) -> None:
    model = summing([weight(), weight(seed=1)])
    before = {name: v.const_value for name, v in model.graph.initializers.items()}
    told: list[tuple[int, int]] = []
    save_model(model, tmp_path, lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
    assert {name: v.const_value for name, v in model.graph.initializers.items()} == before


def test_a_failing_write_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = summing([weight()])
    before = dict(model.graph.initializers)
    (tmp_path / MODEL_FILE).mkdir()
    with pytest.raises(OSError, match="."):
        save_model(model, tmp_path)
    assert isinstance(model.graph.initializers["w0"].const_value, ir.Tensor)
    assert dict(model.graph.initializers) == before


def test_a_table_is_stored_as_it_is_read(tmp_path: Path) -> None:
    graph = table_graph(weight(100, 32))
    lower(
        graph,
        {LAYER: fit(weight(100, 32), Spec("dense"), CoreFormat.parse("fp16"), role="embedding")},
        accuracy_level=0,
    )
    assert sum(save_model(graph.model, tmp_path).values()) == 100 * 32 * 2
