"""Prints how wall time and peak memory of block-streamed compression grow: `python -m runtime_tests.streaming`.

Random weights in the shape of a 300-million-parameter Llama with 4, 8 and 16 blocks, and in the shape of a 1.2-billion
one with 16, each compressed in a fresh process with half of its parameters in int4 on random tokens. Peak memory has
to grow with the block and the vocabulary, not with the number of blocks. `--whole` runs the same plan by
`fit_choices` on the whole model beside it; `--quick` cuts the large shape to 2 blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PLAN = "uniform:0.5:int4-b32"
BUDGET_BYTES = 6_000_000_000
"""What the 1B shape may take at its peak [bytes]."""
GROWTH = 1.10
"""What peak memory may grow by from the shallowest to the deepest model of one shape [factor]."""


def measure(model: Path, out: Path, tokens: int, *, whole: bool) -> dict[str, float]:
    """Compress one model in this process: seconds, peak and starting resident set [bytes], parameters, file bytes."""
    import torch

    from edgec import modeling
    from edgec.bench.worker import memory
    from edgec.calibration import Batches
    from edgec.checkpoint import open_checkpoint
    from edgec.compress.apply import fit_choices
    from edgec.compress.store import save_compressed
    from edgec.compress.streaming import compress_streamed
    from edgec.export.targets import get_target
    from edgec.plan.files import write_plan
    from edgec.plan.planner import constrained_plan
    from edgec.profile.activations import collect

    checkpoint = open_checkpoint(model)
    layers = modeling.layers(modeling.skeleton(checkpoint))
    plan = constrained_plan(PLAN, layers, get_target("onnx-x64"), checkpoint.fingerprint)
    ids = torch.randint(2, 270, (tokens // 256, 256), generator=torch.Generator().manual_seed(0))
    items = tuple({"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(16))
    batches = Batches("random tokens", items)
    start, before = time.monotonic(), memory()[0]
    if whole:
        dense = modeling.load_dense(checkpoint)
        found = collect(dense, layers, batches, pooling=None, curvature=False)
        weights: Any = {n.removesuffix(".weight"): p.float().numpy() for n, p in dense.named_parameters()}
        tied = {layer.name: layer.tied_to for layer in layers if layer.tied_to}
        factors = fit_choices(plan.choices, lambda name: weights[tied.get(name, name)], layers, found.moment)
        save_compressed(checkpoint, plan, factors, write_plan(plan), out)
    else:
        compress_streamed(
            checkpoint,
            layers,
            plan,
            batches,
            out,
            plan_text=write_plan(plan),
            progress=lambda done, total: sys.stderr.write(f"{done}/{total} {memory()[1] / 1e9:.2f} GB\n"),
        )
    return {
        "seconds": time.monotonic() - start,
        "before": before,
        "peak": memory()[1],
        "parameters": checkpoint.parameters,
        "bytes": sum(f.stat().st_size for f in out.rglob("*") if f.is_file()),
    }


def in_fresh_process(shape: str, blocks: int, tokens: int, *, whole: bool) -> dict[str, float]:
    """Write the model, compress it in a process of its own, remove both. Progress goes to standard error."""
    from edgec.bench import shapes
    from edgec.subprocesses import run

    with tempfile.TemporaryDirectory(prefix="edgec-streaming-") as folder:
        work = Path(folder)
        model = shapes.write(shapes.with_layers(shapes.get(shape), blocks), work / "model")
        argv: list[str | Path] = [sys.executable, "-m", "runtime_tests.streaming", "--worker", model, work / "out"]
        argv += ["--tokens", str(tokens), *(["--whole"] if whole else [])]
        done = run(argv, timeout_s=7200, cwd=Path(__file__).parents[1])
        if not done.ok:
            raise SystemExit(f"{shape} with {blocks} blocks: {done.reason()}")
        result: dict[str, float] = json.loads(done.stdout)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16], help="depths of the small shape")
    parser.add_argument("--large", type=int, default=16, help="blocks of the 1B shape; 0 leaves it out")
    parser.add_argument("--quick", action="store_true", help="the 1B shape with 2 blocks only")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens")
    parser.add_argument("--whole", action="store_true", help="also the whole model at once, for comparison")
    parser.add_argument("--worker", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        sys.stdout.write(json.dumps(measure(*options.worker, options.tokens, whole=options.whole)))
        return
    table = Table(title=f"{PLAN}, {options.tokens} tokens, {os.environ.get('OMP_NUM_THREADS', 'all')} threads")
    for column in ("shape", "blocks", "parameters", "way", "wall s", "peak RSS GB", "before GB", "folder MB"):
        table.add_column(column, justify="right")
    peaks: list[float] = []
    large = 2 if options.quick else options.large
    wanted = [("llama-300m", n) for n in options.blocks] + [("llama-3.2-1b", large)] * (large > 0)
    for shape, blocks in wanted:
        for whole in (False, True) if options.whole and shape == "llama-300m" else (False,):
            found = in_fresh_process(shape, blocks, options.tokens, whole=whole)
            table.add_row(
                shape,
                str(blocks),
                f"{found['parameters'] / 1e6:.0f} M",
                "whole" if whole else "streamed",
                f"{found['seconds']:.0f}",
                f"{found['peak'] / 1e9:.2f}",
                f"{found['before'] / 1e9:.2f}",
                f"{found['bytes'] / 1e6:.0f}",
            )
            if shape == "llama-300m" and not whole:
                peaks.append(found["peak"])
            elif not whole and found["peak"] > BUDGET_BYTES:
                raise SystemExit(f"{shape}: {found['peak'] / 1e9:.2f} GB at the peak, at most {BUDGET_BYTES / 1e9:.0f}")
    Console(width=100).print(table)
    if len(peaks) > 1 and peaks[-1] > GROWTH * peaks[0]:
        raise SystemExit(f"peak memory grew with the model: {peaks[0] / 1e9:.2f} → {peaks[-1] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
