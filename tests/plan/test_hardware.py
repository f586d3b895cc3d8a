"""The hardware table: every target is held to its row, the machine is told by its flags, verdicts are SEEDS'."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgec.errors import PlanError, UsageError
from edgec.export.targets import all_targets, get_target
from edgec.plan import hardware
from edgec.plan.hardware import DEFAULT, HARDWARE, IF_BENCHMARKED, IF_VALIDATED, NO, executes, formats
from edgec.records import Target


@pytest.mark.parametrize("target", all_targets().values(), ids=lambda t: t.name)
def test_every_format_a_target_offers_runs_fast_on_its_hardware(target: Target) -> None:
    row = hardware.of_target(target)
    offered = {*target.dense_formats, *target.factored_formats, *target.residual_formats, target.default_format}
    assert {f for f in offered if not executes(row, f)} == set()
    assert {f for f in target.embedding_formats if not executes(row, f, lookup=True)} == set()
    assert target.default_format.partition("-")[0] == formats(row)[0]


def test_a_target_without_a_row_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="'new-thing' has no row in the hardware table"):
        hardware.of_target(replace(get_target("onnx-x64"), name="new-thing"))


def test_every_row_has_a_source_and_one_default() -> None:
    for row in HARDWARE.values():
        assert all(s.why and s.source for s in row.supports), row.name
        assert len({s.family for s in row.supports}) == len(row.supports)
        assert sum(s.verdict == DEFAULT for s in row.supports) == (row.name != "x86-64-baseline"), row.name


@pytest.mark.parametrize(
    ("name", "family", "verdict"),
    [
        ("nvidia-ampere", "int8", DEFAULT),
        ("nvidia-ampere", "fp8", NO),
        ("nvidia-ada", "int8", DEFAULT),
        ("nvidia-ada", "fp8", IF_BENCHMARKED),
        ("nvidia-hopper", "fp8", DEFAULT),
        ("nvidia-blackwell", "fp8", DEFAULT),
        ("nvidia-blackwell", "fp4", IF_VALIDATED),
        ("x86-64-avx2", "fp8", NO),
        ("arm64-dotprod", "int2", NO),
    ],
)
def test_the_list_of_the_decision(name: str, family: str, verdict: str) -> None:
    found = hardware.get(name).support(family)
    assert found is not None
    assert found.verdict == verdict
    assert (family in formats(hardware.get(name))) == (verdict == DEFAULT)


@pytest.mark.parametrize(
    ("target", "machine", "elsewhere"),
    [
        ("onnx-x64", "AMD EPYC Linux 6.1 (x86_64)", False),
        ("onnx-x64", "Windows 11 (AMD64)", False),
        ("onnx-x64", "aarch64 Linux 6.1", True),
        ("onnx-arm64", "Apple M2 Darwin 24 (arm64)", False),
        ("onnx-arm64", "x86_64 Linux", True),
        ("onnx-arm64", "armv7l Linux", False),
        ("gguf", "x86_64 Linux", False),
        ("", "x86_64 Linux", False),
    ],
)
def test_targets_of_other_processors_are_noticed(target: str, machine: str, elsewhere: bool) -> None:
    """Of a machine that names none of the known kinds nothing is said."""
    assert hardware.misplaced(target, machine) == elsewhere


def test_blocks_count_where_kernels_have_them() -> None:
    x64, arm64, ada = (hardware.get(n) for n in ("x86-64-avx2", "arm64-dotprod", "nvidia-ada"))
    assert executes(x64, "int2-b64")
    assert not executes(x64, "int2-b32")
    assert executes(x64, "int2-b32", lookup=True)
    assert not executes(x64, "int4-b32+int2-b32")
    assert executes(arm64, "int4-b32")
    assert not executes(arm64, "int4-b64")
    assert executes(x64, "int4-b32-zp")
    assert not executes(x64, "int3-b32")
    assert not executes(ada, "fp8-e4m3-b32")
    assert executes(hardware.get("nvidia-hopper"), "fp8-e4m3-b32")
    assert executes(hardware.get("x86-64-baseline"), "fp32")
    assert executes(hardware.get("ggml-cpu"), "iq3_xxs")
    assert not executes(x64, "q4_k")  # onnxruntime has no kernel for it, as many bits as it has others for
    assert not executes(hardware.get("ggml-cpu"), "fp8-e4m3-b32")


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "expected"),
    [
        ("x86_64", "model name\t: Some CPU\nflags\t: sse avx2 avx512_vnni", "x86-64-avx512-vnni"),
        ("AMD64", "flags : sse avx2", "x86-64-avx2"),
        ("x86_64", "flags : sse sse4_1", "x86-64-baseline"),
        ("x86_64", "", "x86-64-avx2"),
        ("arm64", "", "arm64-dotprod"),
        ("aarch64", "Features : fp asimd asimddp", "arm64-dotprod"),
    ],
)
def test_the_machine_is_told_by_its_flags(machine: str, cpuinfo: str, expected: str) -> None:
    assert hardware.detect(machine, cpuinfo).hardware.name == expected


def test_gguf_runs_on_any_processor_and_onnx_on_its_own() -> None:
    assert hardware.runs_here(hardware.get("ggml-cpu"))
    assert hardware.runs_here(hardware.detect().hardware)
    assert not hardware.runs_here(hardware.get("nvidia-ada"))


def test_this_machine_has_a_row_and_others_are_refused() -> None:
    assert hardware.detect().hardware in HARDWARE.values()
    assert hardware.detect("x86_64", "model name : Some CPU").processor == "Some CPU"
    with pytest.raises(PlanError, match="'riscv64'"):
        hardware.detect("riscv64", "")
    with pytest.raises(UsageError, match="unknown hardware 'z80'; known: x86-64-avx512-vnni"):
        hardware.get("z80")
