"""Prints the figures of the ggml runtime: `python -m runtime_tests.ggml.figures [--size 300m] [--type Q4_0] …`.

Dense random weights in llama.cpp (with and without memory mapping) and in edgec's runtime, and the same shape with
block linears and head at half their parameters. Each measurement is a fresh process, contestants take turns and their
order rotates; medians with quartiles. Quality is not measured: the weights are noise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from edgec.bench.shapes import SHAPES
from runtime_tests.ggml.files import BLOCK_BYTES, SIZES, Made, write

RATIO = 0.5
CONTESTANTS: Mapping[str, Mapping[str, Any]] = {
    "llama.cpp": {"runtime": "llama.cpp", "mmap": True, "factored": False},
    "llama.cpp, no mmap": {"runtime": "llama.cpp", "mmap": False, "factored": False},
    "edgec dense": {"runtime": "ggml", "factored": False},
    f"edgec uniform:{RATIO}": {"runtime": "ggml", "factored": True},
}
Samples = Mapping[str, list[dict[str, float]]]


def measure(files: Mapping[bool, Made], settings: Mapping[str, Any], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Samples by contestant. files: by whether they are factored."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    names = list(CONTESTANTS)
    for number in range(rounds):
        for name in [*names[number % len(names) :], *names[: number % len(names)]]:
            contestant = CONTESTANTS[name]
            job = {**settings, **contestant, "file": str(files[contestant["factored"]].path)}
            command = [sys.executable, "-m", "runtime_tests.ggml.worker", json.dumps(job)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def spread(samples: Sequence[Mapping[str, float]], key: str, scale: float = 1.0, digits: int = 1) -> str:
    """Median with quartiles."""
    low, middle, high = np.quantile([s[key] for s in samples], [0.25, 0.5, 0.75]) * scale
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def median(samples: Sequence[Mapping[str, float]], key: str) -> float:
    return float(np.median([s[key] for s in samples]))


def checks(files: Mapping[bool, Made], found: Samples) -> list[tuple[str, float, str, bool]]:
    """(what, value, line, reached): the figures that the issue asks for."""
    dense, factored, theirs = found["edgec dense"], found[f"edgec uniform:{RATIO}"], found["llama.cpp"]
    bytes_ratio = files[False].read_bytes / files[True].read_bytes
    decode = median(factored, "decode") / median(dense, "decode")
    prefill = median(factored, "prefill") / median(dense, "prefill")
    rows = [
        ("decode, factored ÷ dense", decode, f"≥ 0.9 × {bytes_ratio:.2f}", decode >= 0.9 * bytes_ratio),
        ("prefill, factored ÷ dense", prefill, "≥ 1.7", prefill >= 1.7),
    ]
    for key in ("decode", "prefill"):
        same = median(dense, key) / median(theirs, key)
        rows.append((f"{key}, edgec dense ÷ llama.cpp", same, "≥ 0.95", same >= 0.95))
    for name, samples, made in (("dense", dense, files[False]), ("factored", factored, files[True])):
        if name == "factored":  # of a dense file whose head is its table, every byte is read, and then there is a cache
            share = (median(samples, "peak_rss") - median(samples, "empty_rss")) / made.file_bytes
            rows.append(("peak RSS beyond the empty runtime ÷ file, factored", share, "≤ 1.05", share <= 1.05))
        load, overhead = median(samples, "load_s"), median(samples, "overhead_ms")
        rows.append((f"load in s, {name}", load, "≤ 2", load <= 2))
        rows.append((f"Python per token in ms, {name}", overhead, "≤ 0.2", overhead <= 0.2))
    return rows


def report(title: str, files: Mapping[bool, Made], found: Samples, console: Console) -> None:
    table = Table(title=title)
    for column in (
        "contestant",
        "file MB",
        "load s",
        "prefill tok/s",
        "decode tok/s",
        "Python ms/token",
        "peak RSS MB",
    ):
        table.add_column(column, justify="left" if column == "contestant" else "right")
    for name, samples in found.items():
        ours = CONTESTANTS[name]["runtime"] == "ggml"
        table.add_row(
            name,
            f"{files[CONTESTANTS[name]['factored']].file_bytes / 1e6:.0f}",
            spread(samples, "load_s", digits=2),
            spread(samples, "prefill"),
            spread(samples, "decode", digits=2),
            spread(samples, "overhead_ms", digits=3) if ours else "–",
            spread(samples, "peak_rss", 1e-6, 0),
        )
    console.print(table)
    for what, value, line, reached in checks(files, found):
        console.print(f"{'reached' if reached else 'MISSED '}  {what}: {value:.3f} ({line})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), action="append")
    parser.add_argument("--type", choices=list(BLOCK_BYTES), action="append")
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--work", type=Path, help="existing folder for the files (several hundred MB to 2 GB)")
    parser.add_argument("--json", type=Path, help="write all samples here")
    given = parser.parse_args()
    console, everything = Console(width=150), []
    for size in given.size or ["300m", "1b"]:
        for kind in given.type or list(BLOCK_BYTES):
            with tempfile.TemporaryDirectory(dir=given.work) as work:
                folder = Path(work)
                files = {
                    False: write(size, kind, folder / "dense.gguf"),
                    True: write(size, kind, folder / "factored.gguf", RATIO),
                }
                for threads in given.threads or [1, 2]:
                    settings = {"threads": threads, "prompt": given.prompt, "new": given.new}
                    settings["vocab"] = SHAPES[SIZES[size]].vocab
                    found = measure(files, settings, given.rounds)
                    title = f"{SIZES[size]}, {kind}, {threads} threads, {given.prompt} + {given.new} tokens"
                    report(f"{title}, {given.rounds} fresh processes each", files, found, console)
                    everything.append({"title": title, **settings, "size": size, "type": kind, "samples": found})
    if given.json:
        given.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
