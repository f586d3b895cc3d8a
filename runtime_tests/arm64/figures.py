"""Prints how far aarch64 and x86-64 are apart on whole exported models: `python -m runtime_tests.arm64.figures`.

measured and allowed are those of `compare`; plain is the difference from x86-64 as it is, and x86 rounding what the
int8 activations of accuracy_level 4 make on x86-64. All are norms of differences over norms (floats: maxima).
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from runtime_tests.arm64.artifacts import compare_decoder, compare_encoder
from runtime_tests.arm64.build import PackagesOutOfReachError, ensure_root
from runtime_tests.arm64.compare import Agreement
from runtime_tests.arm64.root import CPUS, Arm64Root
from runtime_tests.models import AbsentModelError, export_for_arm64, minilm_folder, stories_folder

PLANS = ("dense:fp32", "dense:int4-b32", "uniform:0.5")
SMALL_PLANS = PLANS[:2]  # ranks of 32 save nothing in matrices of width 64


def rows(root: Arm64Root, work: Path) -> Iterator[tuple[str, str, str, str, Agreement]]:
    """(artifact, cpu, kernels, what ran, agreement) for every artifact on every emulated CPU."""
    for model, folder, plans, compare in (
        ("all-MiniLM-L6-v2", minilm_folder, PLANS, compare_encoder),
        ("stories260K", stories_folder, SMALL_PLANS, compare_decoder),
    ):
        try:
            source = folder()
        except AbsentModelError as error:
            sys.stderr.write(f"{error}\n")
            continue
        for plan in plans:
            artifact = export_for_arm64(source, plan, work / f"{model}-{plan.replace(':', '-')}")
            for cpu in CPUS:
                found = compare(root, artifact, cpu=cpu)
                steps = ["batch"] if compare is compare_encoder else ["prefill", "decode"]
                each = len(found) // len(steps)
                for i, agreement in enumerate(found):
                    kernels = "packed" if agreement.packed else "portable" if agreement.quantised else "float"
                    yield f"{model} {plan}", cpu, kernels, steps[i // each], agreement


def main() -> int:
    """0 when every artifact agrees on every CPU, 1 when one does not, 3 where the arm64 runtime is out of reach."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        root = Arm64Root(ensure_root())
    except PackagesOutOfReachError as error:
        sys.stderr.write(f"no arm64 runtime: {error}\n")
        return 3
    sys.stdout.write(
        "| artifact | cpu | kernels | run | measured | allowed | plain | x86 rounding | agrees |\n"
        + "| --- " * 9
        + "|\n"
    )
    agree = True
    with tempfile.TemporaryDirectory(prefix="edgec-arm64-figures-") as work:
        for artifact, cpu, kernels, step, agreement in rows(root, Path(work)):
            worst = max(agreement.gaps, key=lambda gap: gap.measured / gap.allowed)
            ok = all(gap.ok for gap in agreement.gaps)
            agree &= ok
            figures = " | ".join(f"{g:.1e}" for g in (worst.measured, worst.allowed, worst.plain, worst.rounding))
            sys.stdout.write(f"| {artifact} | {cpu} | {kernels} | {step} | {figures} | {'yes' if ok else 'NO'} |\n")
            sys.stdout.flush()
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
