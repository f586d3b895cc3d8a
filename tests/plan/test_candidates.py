"""What targets offer for a layer: only what their kernels execute, floats only where nothing else fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgec import decompose, limits
from edgec.contraction import core_shapes, quantisable, widest
from edgec.errors import UsageError
from edgec.export.targets import all_targets, get_target
from edgec.fit import contraction_of, stored_bytes
from edgec.plan.candidates import FALLBACK, candidates, executable, uniform
from edgec.quantize.formats import CoreFormat, LayerFormat, PairFormat
from edgec.quantize.ggml_formats import GgmlFormat
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
            assert spec.kind in ("dense", *decompose.lookups())
        assert not fmt.simulated
        if not fmt.quantised:
            assert (spec.kind, fmt) == ("dense", FALLBACK)
            continue
        if isinstance(fmt, PairFormat):
            assert spec.kind in ("residual", "disentangled") or role == "embedding"
        assert all(rank % target.rank_multiple == 0 for rank in spec.ranks)
        contraction = contraction_of(spec, shape, role)
        for core, (*_, k) in core_shapes(contraction).items():
            if core in quantisable(contraction) and role != "embedding":
                assert isinstance(fmt.of(core), GgmlFormat) or k >= fmt.of(core).block
                assert k % target.k_multiple == 0


def test_arm64_offers_no_two_bits_and_blocks_of_32_only() -> None:
    for _, fmt in candidates([ARM64], "linear", (384, 1536)):
        assert isinstance(fmt, CoreFormat)  # no pairs either: every backbone worth correcting has two bits
        assert fmt.bits in (4, 8)
        assert fmt.block == 32
    assert (Spec("dense"), CoreFormat.parse("int2-b64")) in candidates([X64], "linear", (384, 1536))


def test_odd_widths_fall_back_to_floats() -> None:
    assert candidates([ARM64], "linear", (100, 70)) == [(Spec("dense"), FALLBACK)]
    assert (Spec("dense"), FALLBACK) not in candidates([ARM64], "embedding", (1000, 70))  # its columns can be fewer
    assert candidates([ARM64], "embedding", (1000, 20)) == [(Spec("dense"), FALLBACK)]
    assert all(fmt.quantised for _, fmt in candidates([ARM64], "linear", (100, 64)))
    both = candidates([X64, ARM64], "linear", (100, 70))
    assert (Spec("dense"), FALLBACK) in both
    assert (Spec("dense"), CoreFormat.parse("int4-b32")) in both


def test_factored_tables_are_of_one_band_or_of_a_pair_of_formats() -> None:
    shape = (30522, 384)
    x64, arm64 = (
        [(spec, fmt) for spec, fmt in candidates([t], "embedding", shape) if spec.kind != "dense"] for t in (X64, ARM64)
    )
    assert {str(fmt) for spec, fmt in x64 if len(spec.ranks) == 1} == {"int4-b32"}
    assert {str(fmt) for spec, fmt in x64 if len(spec.ranks) == 2} == {"int2-b32+int4-b32"}
    assert {(len(spec.ranks), str(fmt)) for spec, fmt in arm64} == {(1, "int4-b32")}
    dense = stored_bytes(Spec("dense"), shape, "embedding", CoreFormat.parse("int4-b64"))
    sizes = sorted(stored_bytes(spec, shape, "embedding", fmt) / dense for spec, fmt in x64)
    assert sizes[0] < 0.6
    assert sizes[-1] < 1.0
    odd = Spec("table_svd", (33,))
    assert not executable(X64, "embedding", shape, odd, CoreFormat.parse("int4-b32"))
    assert not executable(X64, "embedding", shape, Spec("table_svd", (64,)), CoreFormat.parse("int4-b128"))


def test_incompressible_layers_stay_dense_and_tables_have_kinds_of_their_own() -> None:
    assert {spec.kind for spec, _ in candidates([X64], "linear", (384, 1536), incompressible=True)} == {"dense"}
    assert {spec.kind for spec, _ in candidates([X64], "embedding", (1000, 384))} == {"dense", *decompose.lookups()}
    kinds = {spec.kind for spec, _ in candidates([X64], "linear", (384, 1536))}
    assert kinds == {"dense", "disentangled", "residual", "svd", "tensor_train"}


def test_backbones_come_with_small_corrections() -> None:
    pair = PairFormat(CoreFormat(2, 128), CoreFormat(4, 32))
    for shape in [(384, 384), (384, 1536), (1536, 384)]:
        offered = [(spec, fmt) for spec, fmt in candidates([X64], "linear", shape) if spec.kind == "residual"]
        assert offered == [(Spec("residual", (32,)), pair), (Spec("residual", (64,)), pair)]
    assert not any(s.kind == "residual" for s, _ in candidates([X64], "linear", (64, 64)))  # narrower than a block


def test_each_core_is_checked_against_its_own_format() -> None:
    good, pair = Spec("residual", (64,)), PairFormat(CoreFormat(2, 128), CoreFormat(4, 32))
    assert executable(X64, "linear", (256, 256), good, pair)
    assert not executable(X64, "linear", (256, 96), good, pair)  # the backbone's block does not fit its rows
    assert not executable(X64, "linear", (256, 256), Spec("residual", (16,)), pair)  # nor the correction's its rank
    assert not executable(X64, "linear", (256, 256), good, CoreFormat(4, 32))
    assert not executable(X64, "linear", (256, 256), good, PairFormat(CoreFormat(2, 128), CoreFormat(8, 32)))
    assert not executable(X64, "linear", (256, 256), Spec("svd", (64,)), pair)
    assert not executable(ARM64, "linear", (256, 256), good, pair)


@pytest.mark.parametrize("name", ["int3-b32", "fp8-e4m3", "int3-b64+int4-b32", "int2-b128+fp8-e4m3"])
@pytest.mark.parametrize("kind", ["dense", "svd", "residual"])
def test_simulated_formats_are_executable_nowhere(name: str, kind: str) -> None:
    fmt, spec = LayerFormat.parse(name), Spec(kind, () if kind == "dense" else (64,))
    for target in all_targets().values():
        offering = replace(target, dense_formats=(name,), factored_formats=(name,), residual_formats=(name,))
        assert not executable(offering, "linear", (256, 256), spec, fmt)
        assert not executable(replace(offering, embedding_formats=(name,)), "embedding", (256, 256), Spec("dense"), fmt)


def test_a_tied_dense_head_must_be_readable_as_a_table_and_fast_to_multiply() -> None:
    tied = candidates([X64], "head", (1000, 384), tied=True)
    dense = {str(fmt) for spec, fmt in tied if spec.kind == "dense"}
    assert dense == set(X64.embedding_formats) & set(X64.dense_formats)
    assert any(spec.kind == "svd" for spec, _ in tied)


def test_uniform_is_the_low_rank_form_or_nothing() -> None:
    assert uniform((384, 1536), 0.5, 32) == Spec("svd", (128,))
    assert uniform((384, 1536), 1.0, 32) == Spec("dense")
    assert uniform((32, 32), 0.5, 32) == Spec("dense")


def test_stock_llama_cpp_is_offered_whole_matrices_only() -> None:
    """Its K types where the rows divide; int4 and int8, which GPTQ makes and healing moves; no factored table."""
    stock, adapter = get_target("gguf"), get_target("gguf-adapter")
    found = candidates([stock], "linear", (384, 768))
    assert {spec.kind for spec, _ in found} == {"dense"}
    assert {str(fmt) for _, fmt in found} == set(stock.dense_formats)
    odd = candidates([stock], "linear", (768, 384))  # 384 is no multiple of 256: others fall back
    assert {str(fmt) for _, fmt in odd} == {"int8-b32", "int4-b32"}
    assert executable(stock, "linear", (768, 384), Spec("dense"), LayerFormat.parse("q4_k"))  # by hand it may fall back
    assert {spec.kind for spec, _ in candidates([stock], "embedding", (5000, 512))} == {"dense"}
    corrected = {str(fmt) for spec, fmt in candidates([adapter], "linear", (768, 768)) if spec.kind == "residual"}
    assert corrected == set(adapter.residual_formats)
    tied = candidates([adapter], "head", (5000, 768), tied=True)
    assert {spec.kind for spec, _ in tied} == {"dense"}  # an adapter corrects tensors of the file; a tied head is none


def test_unknown_targets_list_the_known_ones() -> None:
    with pytest.raises(UsageError, match="known: gguf, .*onnx-arm64, onnx-x64"):
        get_target("onnx-riscv")


def test_a_train_that_would_fill_the_memory_is_not_offered() -> None:
    """28 million numbers of one token between two cores of 14336 × 4096: its parameters are few."""
    target = get_target("gguf-factored")
    wide = Spec("tensor_train", (3424,), ((112, 64), (128, 64)))
    assert widest(contraction_of(wide, (14336, 4096), "linear")) > limits.MAX_DIMENSION
    assert not executable(target, "linear", (14336, 4096), wide, LayerFormat.parse("int4-b32"))
    narrow = Spec("tensor_train", (32,), ((112, 64), (128, 64)))
    assert executable(target, "linear", (14336, 4096), narrow, LayerFormat.parse("int4-b32"))
