"""Stacks of products run in onnxruntime, in the nodes that an export has, each with weights and an input of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from edgec.export.onnx.stack import write_stack
from edgec.quantize.formats import CoreFormat


@pytest.mark.parametrize(
    ("name", "int8", "kind"),
    [
        ("fp32", False, "MatMul"),
        ("fp16", True, "MatMul"),
        ("int4-b32", False, "MatMulNBits"),
        ("int4-b32", True, "MatMulIntegerToFloat"),
        ("int8-b128", True, "MatMulIntegerToFloat"),
    ],
)
def test_every_product_is_one_of_its_own(name: str, int8: bool, kind: str, tmp_path: Path) -> None:
    fmt, shape, copies = CoreFormat.parse(name), (96, 256), 3
    stored = write_stack(tmp_path, fmt, shape, copies, accuracy_level=4, int8=int8)
    assert stored == copies * fmt.stored_bytes(shape)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) >= stored
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node)
    assert kinds[kind] == copies and kinds["DynamicQuantizeLinear"] == copies * (kind == "MatMulIntegerToFloat")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((5, 256)).astype(np.float32)
    (found,) = session.run(None, {value.name: x for value in session.get_inputs()})
    assert found.shape == (5, copies) and np.isfinite(found).all()
    assert len({column.tobytes() for column in found.T}) == copies
