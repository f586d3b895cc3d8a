"""What targets offer for a layer: only what their kernels execute, floats only where nothing else fits."""

from __future__ import annotations

import pytest

from edgec.contraction import MatMul
from edgec.errors import UsageError
from edgec.export.targets import all_targets, get_target
from edgec.fit import contraction_of
from edgec.plan.candidates import FALLBACK, candidates, executable, uniform
from edgec.quantize.formats import CoreFormat
from edgec.records import Spec

X64, ARM64 = get_target("onnx-x64"), get_target("onnx-arm64")
SHAPES = [(384, 384), (384, 1536), (2048, 8192), (100, 96), (33, 70), (16, 16), (64, 32)]
ROLES = [("linear", False), ("head", False), ("head", True), ("embedding", False)]


@pytest.mark.parametrize("target", all_targets().values(), ids=lambda t: t.name)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("role", "tied"), ROLES)
def test_everything_offered_is_executable(target: object, shape: tuple[int, int], role: str, tied: bool) -> None:
    assert isinstance(target, type(X64))
    found = candidates([target], role, shape, tied=tied)
    assert found
    assert len(set(found)) == len(found)
    for spec, fmt in found:
        assert executable(target, role, shape, spec, fmt, tied=tied)
        if role == "embedding":
            assert spec.kind == "dense"
        if not fmt.quantised:
            assert (spec.kind, fmt) == ("dense", FALLBACK)
            continue
        assert all(rank % target.rank_multiple == 0 for rank in spec.ranks)
        for step in contraction_of(spec, shape, role).steps:
            if isinstance(step, MatMul):
                assert step.k >= fmt.block or role == "embedding"
                assert step.k % target.k_multiple == 0


def test_arm64_offers_no_two_bits_and_blocks_of_32_only() -> None:
    for _, fmt in candidates([ARM64], "linear", (384, 1536)):
        assert fmt.bits in (4, 8)
        assert fmt.block == 32
    assert (Spec("dense"), CoreFormat.parse("int2-b64")) in candidates([X64], "linear", (384, 1536))


def test_odd_widths_fall_back_to_floats() -> None:
    assert candidates([ARM64], "linear", (100, 70)) == [(Spec("dense"), FALLBACK)]
    assert candidates([ARM64], "embedding", (1000, 70)) == [(Spec("dense"), FALLBACK)]
    assert all(fmt.quantised for _, fmt in candidates([ARM64], "linear", (100, 64)))
    both = candidates([X64, ARM64], "linear", (100, 70))
    assert (Spec("dense"), FALLBACK) in both
    assert (Spec("dense"), CoreFormat.parse("int4-b32")) in both


def test_incompressible_layers_and_tables_stay_dense() -> None:
    assert {spec.kind for spec, _ in candidates([X64], "linear", (384, 1536), incompressible=True)} == {"dense"}
    assert {spec.kind for spec, _ in candidates([X64], "embedding", (1000, 384))} == {"dense"}
    assert {"dense", "svd", "tensor_train"} == {spec.kind for spec, _ in candidates([X64], "linear", (384, 1536))}


def test_a_tied_dense_head_must_be_readable_as_a_table() -> None:
    tied = candidates([X64], "head", (1000, 384), tied=True)
    dense = {str(fmt) for spec, fmt in tied if spec.kind == "dense"}
    assert dense == set(X64.embedding_formats)
    assert any(spec.kind == "svd" for spec, _ in tied)


def test_uniform_is_the_low_rank_form_or_nothing() -> None:
    assert uniform((384, 1536), 0.5, 32) == Spec("svd", (128,))
    assert uniform((384, 1536), 1.0, 32) == Spec("dense")
    assert uniform((32, 32), 0.5, 32) == Spec("dense")


def test_unknown_targets_list_the_known_ones() -> None:
    with pytest.raises(UsageError, match="known: onnx-arm64, onnx-x64"):
        get_target("onnx-riscv")
