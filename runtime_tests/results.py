"""RESULTS.md, the numbers that the README quotes: `make results`, or `python -m runtime_tests.results [NAME …]`.

Every section is what one command printed, with the day, the machine and the versions. A section is replaced when its
command has ended well and stays as it was otherwise, so that hours of figures can be made again one at a time. Reading
numbers out of the commands' JSON and laying tables out anew was turned down: what is kept here is what a reader sees
who types the same.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edgec.bench.devices import open_device
from edgec.outputs import written_file

FILE = Path(__file__).resolve().parents[1] / "RESULTS.md"

_SHAPE = (
    "edgec bench --shape llama-3.2-1b --target onnx-x64 --target gguf-factored --baseline int4 "
    "--baseline int4-pruned --baseline q4_0 --baseline q4_k_m --baseline q8_0"
)
FIGURES: Mapping[str, tuple[str, str]] = {
    "minilm": ("all-MiniLM-L6-v2, exported, STS-Benchmark dev", "python -m runtime_tests.figures minilm"),
    "encoders": ("all-MiniLM-L6-v2 on x86-64: size, quality and speed", "python -m runtime_tests.encoders"),
    "decoders": (
        "A small Llama of Python source on x86-64: size, quality and speed, both runtimes",
        "python -m runtime_tests.decoders",
    ),
    "minilm-total": (
        "all-MiniLM-L6-v2, tables compressed too, healed, STS-Benchmark dev",
        "python -m runtime_tests.figures minilm-total",
    ),
    "frontier-minilm": (
        "all-MiniLM-L6-v2 at fewer bits, healed and not",
        "python -m runtime_tests.frontier minilm --bits 4,3,2.5,2,1.5 --search greedy:30s --heal 150steps --peers gptq",
    ),
    "frontier-minilm-peers": (
        "all-MiniLM-L6-v2, every method at equal bits, nothing healed",
        "python -m runtime_tests.frontier minilm --bits 5,4,3,2.5,2,1.5 --search greedy:30s --heal off "
        "--peers rtn,gptq,svd_llm,tt,ggml",
    ),
    "frontier-pycode-lm": (
        "A small Llama of Python source, every method at equal bits",
        "python -m runtime_tests.frontier pycode-lm --search greedy:40s --heal 100steps "
        "--peers rtn,gptq,svd_llm,tt,ggml",
    ),
    "frontier-stories": (
        "stories260K, every method at equal bits",
        "python -m runtime_tests.frontier stories --search greedy:40s --heal 300steps",
    ),
    "headlines": ("The sources' headlines", "python -m runtime_tests.frontier headlines --heal 1500steps"),
    "streaming": ("Compression of models too large to hold", "python -m runtime_tests.streaming"),
    "shape-1b": ("Llama 3.2 1B shape, random weights: both runtimes against dense peers", _SHAPE),
    "shape-1b-again": ("The same bench once more", _SHAPE),
    "shape-1b-one-thread": ("The same on one thread", f"{_SHAPE} --threads 1"),
    "ggml": (
        "Factored and dense GGUF files, random weights, against llama.cpp",
        "python -m runtime_tests.ggml.figures --threads 1 --threads 2 --rounds 3",
    ),
    "tensorly": ("One layer as a tensor train, beside TensorLy-Torch", "python -m runtime_tests.tensorly_layer"),
    "arm64": ("arm64 against x86-64", "python -m runtime_tests.arm64.figures"),
}
"""Name → (heading, command). Commands without a shell's characters: they are split, not interpreted."""

_PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "llama-cpp-python")
_INTRODUCTION = """# Results

Every table is the output of the command above it, made by `make results` (all of them) or
`python -m runtime_tests.results NAME` (one). Rows of one table can be compared; tables of different runs come from
different states of a machine. How to read the numbers: see README.md.
"""


def section(name: str, output: str, seconds: float) -> str:
    """One section in Markdown, between markers."""
    heading, command = FIGURES[name]
    return (
        f"<!-- {name} -->\n## {heading}\n\n```sh\n{command}\n```\n\n```text\n{output.strip()}\n```\n\n"
        f"{time.strftime('%Y-%m-%d')}, {seconds / 60:.0f} minutes. {machine()}\n<!-- end {name} -->"
    )


def machine() -> str:
    told = open_device("local").describe()
    known = []
    for package in _PACKAGES:
        try:
            known.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{told['processor']}, {told['cores']}, {told['memory']}, {platform.system()}; {', '.join(known)}."


def merged(text: str, sections: Mapping[str, str]) -> str:
    """RESULTS.md with these sections in place of the old ones, all in the order of FIGURES."""
    kept = {
        name: found[0]
        for name in FIGURES
        if (found := re.findall(rf"<!-- {name} -->.*?<!-- end {name} -->", text, re.DOTALL))
    } | dict(sections)
    return "\n\n".join([_INTRODUCTION.strip(), *(kept[name] for name in FIGURES if name in kept)]) + "\n"


def keep(name: str, output: str, seconds: float) -> None:
    """Put one command's output into RESULTS.md."""
    text = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
    with written_file(FILE) as temporary:
        temporary.write_text(merged(text, {name: section(name, output, seconds)}), encoding="utf-8")


def made(name: str) -> bool:
    """Run one figure's command and keep what it printed; False, and nothing changed, where it failed."""
    program, *arguments = shlex.split(FIGURES[name][1])
    argv = [sys.executable, *(["-m", "edgec"] if program == "edgec" else []), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        status = subprocess.run(argv, stdout=output, env=environment, cwd=FILE.parent, check=False).returncode
        output.seek(0)
        text = output.read()
    if status:
        sys.stderr.write(f"{name}: exit status {status}; its section stays as it was\n")
        return False
    keep(name, text, time.monotonic() - started)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runtime_tests.results", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *FIGURES], help="default: all, which takes hours")
    parser.add_argument("--from-log", type=Path, help="keep this output of the one named command instead of running it")
    parser.add_argument("--minutes", type=float, default=0.0, help="how long the logged run took")
    given = parser.parse_args(arguments)
    if given.from_log:
        (name,) = given.names
        keep(name, given.from_log.read_text(encoding="utf-8"), 60 * given.minutes)
        return 0
    return 0 if all([made(name) for name in given.names or FIGURES]) else 1


if __name__ == "__main__":
    sys.exit(main())
