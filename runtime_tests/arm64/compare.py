"""Holds what onnxruntime computes on aarch64 against what it computes on x86-64, for one model and one input.

Two yardsticks. A graph in floating point must agree within 1e-3 of the largest output value. In a graph with
`MatMulNBits` at `accuracy_level` 4 both machines round activations to int8, so the yardstick is the difference
that this rounding makes on x86-64 alone: the same graph and input with and without `accuracy_level` 4. The packed
arm64 kernels round in a way of their own (see `variants`): with them, arm64 is held against an x86-64 run that
spells that rounding out, and the yardstick is the difference that this spelled-out rounding makes; the plain
difference, and what x86-64's own rounding makes, are reported beside it.

Why whole models differ by nearly as much as they may: a difference of 1e-7 moves a few activations over a rounding
boundary, and each layer of rounding multiplies that, so that after a few layers (measured: all-MiniLM-L6-v2, six)
two correct machines round almost independently of each other. Shallow or narrow models agree to 1e-6.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime_tests.arm64.root import DEFAULT_CPU, Arm64Root, Arm64Run
from runtime_tests.arm64.variants import PORTABLE_KERNELS, packed_arm_kernels, without_rounding
from runtime_tests.arm64.worker import run_case

FLOAT_TOLERANCE = 1e-3
"""Largest difference over largest value that floating-point graphs may show [fraction]."""

ROUNDING_FACTOR = 2**0.5
"""How many times the difference that rounding makes on x86-64 arm64 may differ by [factor]: both machines round, and
where the last bits of their sums differ, they do so independently of one another."""

ROUNDING_FLOOR = 1e-3
"""Added to that [fraction]: where x86-64 ignores `accuracy_level` its own difference is 0."""


@dataclass(frozen=True)
class Gap:
    """How far one output of arm64 is off, and how far it may be, in the same measure [fractions].

    plain: the difference from the unedited x86-64 run; rounding: what x86-64's own rounding makes, 0 in floating
    point. They differ from `measured` and `allowed` only with packed arm64 kernels.
    """

    output: str
    measured: float
    allowed: float
    plain: float
    rounding: float = 0.0

    @property
    def ok(self) -> bool:
        return self.measured <= self.allowed  # False for NaN


@dataclass(frozen=True)
class Agreement:
    """One model on both machines. quantised: which yardstick; packed: whether arm64's own rounding was spelled out."""

    gaps: tuple[Gap, ...]
    quantised: bool
    packed: bool
    arm: Arm64Run
    x86: dict[str, np.ndarray]

    def check(self) -> None:
        """Raise `AssertionError` that lists every output which is too far off."""
        lines = [f"{gap.output}: {gap.measured:.2e}, allowed {gap.allowed:.2e}" for gap in self.gaps if not gap.ok]
        if lines or not self.gaps:
            raise AssertionError("arm64 and x86-64 disagree: " + ("; ".join(lines) or "no outputs"))


def max_gap(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest expected value; infinite when shape or finiteness differ."""
    return _gap(got, expected, np.inf)


def norm_gap(got: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of what was expected; infinite when shape or finiteness differ."""
    return _gap(got, expected, 2)


def _gap(got: np.ndarray, expected: np.ndarray, order: float) -> float:
    if got.shape != expected.shape or got.dtype != expected.dtype or not np.isfinite(got).all():
        return float("inf")
    if expected.size == 0:
        return 0.0
    reference = np.linalg.norm(expected.astype(np.float64).ravel(), order)
    difference = np.linalg.norm(got.astype(np.float64).ravel() - expected.astype(np.float64).ravel(), order)
    return float(difference / reference) if reference else float(difference)


def compare_with_x86(
    root: Arm64Root,
    model: Path,
    inputs: Mapping[str, np.ndarray],
    *,
    cpu: str = DEFAULT_CPU,
    config: Mapping[str, str] | None = None,
    timeout_s: float = 300.0,
) -> Agreement:
    """Run a model (external data beside it) on arm64 and on x86-64; call `.check()` on the result.

    `config` holds session entries for arm64; `variants.PORTABLE_KERNELS` avoids the packed kernels.
    """
    arm = root.run_onnx(model, inputs, config=config, cpu=cpu, timeout_s=timeout_s)
    return judge(arm, model, inputs, config=config)


def judge(
    arm: Arm64Run, model: Path, inputs: Mapping[str, np.ndarray], *, config: Mapping[str, str] | None = None
) -> Agreement:
    """Hold a finished arm64 run (with session entries `config`) against x86-64 runs of the same model and input."""
    feeds = dict(inputs)
    x86 = run_case(str(model), feeds)
    with tempfile.TemporaryDirectory(prefix="edgec-arm64-") as folder:
        unrounded = without_rounding(model, Path(folder, "unrounded"))
        if unrounded is None:
            differences = {name: max_gap(arm.outputs[name], x86[name]) for name in x86}
            gaps = tuple(Gap(name, gap, FLOAT_TOLERANCE, gap) for name, gap in differences.items())
            return Agreement(gaps, False, False, arm, x86)
        exact = run_case(str(unrounded), feeds)
        portable = (config or {}).items() >= PORTABLE_KERNELS.items()
        packed = None if portable else packed_arm_kernels(model, Path(folder, "packed"))
        expected = x86 if packed is None else run_case(str(packed), feeds)
    gaps = tuple(
        Gap(
            output=name,
            measured=norm_gap(arm.outputs[name], expected[name]),
            allowed=ROUNDING_FACTOR * norm_gap(expected[name], exact[name]) + ROUNDING_FLOOR,
            plain=norm_gap(arm.outputs[name], x86[name]),
            rounding=norm_gap(x86[name], exact[name]),
        )
        for name in x86
    )
    return Agreement(gaps, True, packed is not None, arm, x86)
