"""Which number formats of cores a class of hardware executes fast: the table behind node 2 of the decision.

Data, not code, so that it can be read and argued with: every row names its source. It says what the hardware *class*
is good for; a `Target` says what one runtime on it is offered, and a test holds every target to its row here.
Asking the driver or torch instead was turned down: a plan is often made on another machine than the one it is for.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgec.errors import PlanError, UsageError
from edgec.quantize.formats import FAST_BLOCKS
from edgec.quantize.ggml_formats import GgmlFormat
from edgec.records import Target

DEFAULT, YES, IF_BENCHMARKED, IF_VALIDATED, NO = "default", "yes", "if benchmarked", "if validated", "no"
"""Verdicts on one family of formats: what to take first, what runs fast too, what needs a benchmark of its own first,
what needs its accuracy validated first, and what has no fast path at all."""


@dataclass(frozen=True)
class Support:
    """One family ("int8", "int4", "int2", "fp8", "fp4") on one class of hardware.

    blocks: block sizes along k that have fast kernels; () where blocks do not matter.
    """

    family: str
    verdict: str
    why: str
    source: str
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Hardware:
    """A class of hardware. machine: `platform.machine()` in lower case, "cuda", or "" for any processor. kv:
    types in which its runtime can keep a KV cache, as edgec's exports use it first.
    """

    name: str
    description: str
    machine: str
    supports: tuple[Support, ...]
    kv: tuple[str, ...]
    kv_source: str

    def support(self, family: str) -> Support | None:
        return next((s for s in self.supports if s.family == family), None)


_FACTS_CPU = "onnxruntime contrib MatMulNBits: 2, 4 and 8 bits run on CPU, 3 are refused; measured with 1.31"
_GGML_CPU = "ggml-cpu"
_GGML = "ggml/src/ggml-cpu (quants, repack) of llama-cpp-python 0.3.36; timed by edgec.bench.microbench_ggml"
_TE = "NVIDIA Transformer Engine, datatype and hardware support matrix, by compute capability"
_TRT = "NVIDIA TensorRT-LLM 0.18 support matrix, precision by SM"
_SEEDS = "the decision list that this table follows (SEEDS, node 2)"
_KV_CPU = (
    "edgec's decoders keep fp32 caches; `edgec kv-cache` copies one to int8, which onnxruntime's CPU "
    "GroupQueryAttention holds (onnxruntime #28576, #28578)"
)
KV_GGUF = ("fp16", "int8")
"""llama.cpp and edgec.runtime.ggml: F16, or Q8_0 with --kv-cache q8_0, whose scales add a sixteenth to int8's bytes."""
KV_GGUF_SOURCE = "ggml keeps F16 caches, and Q8_0 ones where heads are a multiple of 32 numbers: --kv-cache q8_0"
_KV_CUDA = "GroupQueryAttention on CUDA holds fp16, int8 and fp8 (onnxruntime #26200)"
_VNNI = "8-bit dot products (VNNI) inside MatMulNBits at accuracy_level 4"
_INT2 = "kernels at blocks of 64 and 128 only; at 32 slower than 4-bit"


def _x86(name: str, description: str, how: str) -> Hardware:
    return Hardware(
        name,
        description,
        "x86_64",
        (
            Support("int8", YES, how, _FACTS_CPU, FAST_BLOCKS),
            Support("int4", DEFAULT, how + "; a third of int8's time at one row", _FACTS_CPU, FAST_BLOCKS),
            Support("int2", YES, _INT2, _FACTS_CPU, (64, 128)),
            Support("fp8", NO, "no instruction; every product would convert first", _FACTS_CPU),
        ),
        ("fp32", "int8"),
        _KV_CPU,
    )


def _nvidia(name: str, description: str, *supports: Support) -> Hardware:
    return Hardware(name, description, "cuda", supports, ("fp16", "int8"), _KV_CUDA)


HARDWARE: Mapping[str, Hardware] = {
    h.name: h
    for h in (
        _x86("x86-64-avx512-vnni", "x86-64 CPU with AVX-512 VNNI", _VNNI),
        _x86("x86-64-avx2", "x86-64 CPU with AVX2", "AVX2 kernels inside MatMulNBits"),
        Hardware(
            "x86-64-baseline",
            "x86-64 CPU without AVX2",
            "x86_64",
            tuple(
                Support(f, NO, "no kernel faster than fp32 is known without AVX2", _FACTS_CPU)
                for f in ("int8", "int4", "int2", "fp8")
            ),
            ("fp32",),
            _KV_CPU,
        ),
        Hardware(
            "arm64-dotprod",
            "arm64 CPU with dot-product instructions (phones, Apple silicon, Raspberry Pi 5)",
            "aarch64",
            (
                Support("int8", YES, "dot-product kernels since onnxruntime 1.23", "onnxruntime #24769, #25110", (32,)),
                Support(
                    "int4",
                    DEFAULT,
                    "KleidiAI: blocks of 32 and k a multiple of the block",
                    "onnxruntime with KleidiAI, block % 32 == 0 and K % block == 0",
                    (32,),
                ),
                Support("int2", NO, "in too few builds that phones carry", _FACTS_CPU),
                Support("fp8", NO, "no instruction", _FACTS_CPU),
            ),
            ("fp32", "int8"),
            _KV_CPU,
        ),
        Hardware(
            _GGML_CPU,
            "CPU with AVX2 or dot-product instructions, on ggml's kernels",
            "",
            (
                Support("int8", YES, "Q8_0: 8-bit dot products", _GGML),
                Support("int6", YES, "Q6_K", _GGML),
                Support("int5", YES, "Q5_K", _GGML),
                Support("int4", DEFAULT, "Q4_0, Q4_K: repacked for AVX2, AVX-512 and NEON; IQ4_XS", _GGML),
                Support("int3", YES, "Q3_K; IQ3 types look their numbers up, which takes longer", _GGML),
                Support("int2", YES, "Q2_K; IQ2 types look their numbers up, which takes longer", _GGML),
                Support("fp8", NO, "ggml has no such type", _GGML),
            ),
            KV_GGUF,
            KV_GGUF_SOURCE,
        ),
        _nvidia(
            "nvidia-ampere",
            "NVIDIA Ampere (compute capability 8.0, 8.6: A100, A10, RTX 30)",
            Support("int8", DEFAULT, "INT8 tensor cores", f"{_TRT}; {_SEEDS}"),
            Support("int4", YES, "weights only, computed in fp16", _TRT),
            Support("fp8", NO, "no FP8 path in the tensor cores", _TE),
            Support("fp4", NO, "no FP4 path in the tensor cores", _TE),
        ),
        _nvidia(
            "nvidia-ada",
            "NVIDIA Ada (compute capability 8.9: L4, L40S, RTX 40)",
            Support("int8", DEFAULT, "INT8 unless an FP8 win is benchmarked", _SEEDS),
            Support("int4", YES, "weights only, computed in fp16", _TRT),
            Support("fp8", IF_BENCHMARKED, "executed, but its win over INT8 is to be shown first", f"{_TE}; {_SEEDS}"),
            Support("fp4", NO, "no FP4 path in the tensor cores", _TE),
        ),
        _nvidia(
            "nvidia-hopper",
            "NVIDIA Hopper (compute capability 9.0: H100, H200)",
            Support("fp8", DEFAULT, "FP8 tensor cores", f"{_TE}; {_SEEDS}"),
            Support("int8", YES, "INT8 tensor cores", _TRT),
            Support("int4", YES, "weights only, computed in fp16", _TRT),
            Support("fp4", NO, "no FP4 path in the tensor cores", _TE),
        ),
        _nvidia(
            "nvidia-blackwell",
            "NVIDIA Blackwell (compute capability 10.x, 12.0: B200, RTX 50)",
            Support("fp8", DEFAULT, "FP8 tensor cores", f"{_TE}; {_SEEDS}"),
            Support("fp4", IF_VALIDATED, "NVFP4 tensor cores, once accuracy is validated", f"{_TE}; {_SEEDS}"),
            Support("int4", YES, "weights only", "NVIDIA TensorRT-RTX support matrix"),
            Support("int8", YES, "weights only on 12.0", "NVIDIA TensorRT-RTX support matrix"),
        ),
    )
}

_FOR_TARGET = {
    "onnx-x64": "x86-64-avx2",
    "onnx-arm64": "arm64-dotprod",
    **dict.fromkeys(("gguf", "gguf-adapter", "gguf-factored"), _GGML_CPU),
}
"""Target → the least capable class of hardware that its formats are chosen for."""

_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}
"""What Windows and macOS call the machines that Linux names otherwise."""


def get(name: str) -> Hardware:
    """Raises UsageError listing the known classes."""
    if name not in HARDWARE:
        raise UsageError(f"unknown hardware {name!r}; known: {', '.join(HARDWARE)}")
    return HARDWARE[name]


def of_target(target: Target) -> Hardware:
    """The class of hardware that a target's formats must run fast on. Raises PlanError for one without a row."""
    if target.name not in _FOR_TARGET:
        raise PlanError(
            f"target {target.name!r} has no row in the hardware table; ask for {' or '.join(_FOR_TARGET)}"
        )
    return HARDWARE[_FOR_TARGET[target.name]]


def misplaced(target: str, machine: str) -> bool:
    """Were a target's formats chosen for another kind of processor than one whose description is `machine`?"""
    meant = HARDWARE[_FOR_TARGET[target]].machine if target in _FOR_TARGET else ""
    if not meant:
        return False
    words = {_ALIASES.get(word, word) for word in re.findall(r"\w+", machine.lower())}
    known = {h.machine for h in HARDWARE.values()}
    return bool(words & known) and meant not in words


def runs_here(hardware: Hardware) -> bool:
    """Is this machine of the class, so that its kernels can be timed here?"""
    return hardware.machine in ("", detect().hardware.machine)


def formats(hardware: Hardware) -> tuple[str, ...]:
    """Families that run fast without further proof, the default first."""
    fast = [s for s in hardware.supports if s.verdict in (DEFAULT, YES)]
    return tuple(s.family for s in sorted(fast, key=lambda s: s.verdict != DEFAULT))


def executes(hardware: Hardware, core_format: str, *, lookup: bool = False) -> bool:
    """Does the class execute a core format ("int4-b32", "fp8-e4m3-b32", a pair "int2-b64+int8-b32") on fast kernels?
    Plain floats always run. lookup: a table's rows are only read, which no block size slows down.
    """
    if "+" in core_format:
        return all(executes(hardware, part, lookup=lookup) for part in core_format.split("+"))
    family, _, rest = core_format.partition("-")
    if (ggml := GgmlFormat.named(core_format)) is not None:
        if hardware.name != _GGML_CPU:
            return False  # its types are read by no other runtime
        family = f"int{ggml.bits}"
    if family in ("fp32", "fp16"):
        return True
    found = hardware.support(family)
    if found is None or found.verdict not in (DEFAULT, YES):
        return False
    blocks = [int(part[1:]) for part in rest.split("-") if part[:1] == "b" and part[1:].isdigit()]
    return lookup or not found.blocks or all(block in found.blocks for block in blocks)


@dataclass(frozen=True)
class Machine:
    """What this machine is. processor: its marketing name, "" where the system does not tell."""

    hardware: Hardware
    processor: str


def detect(machine: str | None = None, cpuinfo: str | None = None) -> Machine:
    """This machine's CPU class. machine, cpuinfo: what `platform.machine()` and /proc/cpuinfo say, for tests.

    Where there is no /proc/cpuinfo, an x86-64 CPU is taken for one with AVX2 (every one since 2013), an arm64 one for
    one with dot products (every Apple one). Raises PlanError for another architecture.
    """
    kind = (machine if machine is not None else platform.machine()).lower()
    told = _cpuinfo() if cpuinfo is None else cpuinfo
    pairs = (line.partition(":") for line in told.splitlines())
    facts = {key.strip().lower(): value.strip() for key, _, value in pairs}
    flags = set(facts.get("flags", facts.get("features", "")).split())
    processor = facts.get("model name", facts.get("model", ""))
    if kind in ("aarch64", "arm64"):
        # Without dot products KleidiAI and the 8-bit kernels fall back; no class of its own until one is measured.
        return Machine(HARDWARE["arm64-dotprod"], processor)
    if kind not in ("x86_64", "amd64"):
        raise PlanError(f"no row of the hardware table is for {kind!r}; known: x86-64 and arm64")
    if "avx512_vnni" in flags:
        return Machine(HARDWARE["x86-64-avx512-vnni"], processor)
    return Machine(HARDWARE["x86-64-avx2" if "avx2" in flags or not flags else "x86-64-baseline"], processor)


def _cpuinfo() -> str:
    """The first processor's lines; "" where the system has no such file."""
    try:
        return Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0]
    except OSError:
        return ""
