"""Dense peers made by other people's tools from the same model, so that a comparison is not against ourselves.

One file per baseline, found by file name. A file sets `PLUGIN = True` and defines

    TASKS: tuple[str, ...]      "encoder", "causal-lm"
    NAME: str       short name, unique within each task: "int8", "int4", …
    TOOL: str       what makes it, for the report
    SOURCE: str     what `build` reads: "dense-onnx" (edgec's own dense fp32 export of an encoder), "dense-gguf"
                    (edgec's own model.gguf of a causal LM, matrices in F16) or "checkpoint"
    build(source: Path, out: Path) -> None      writes a folder that the measurement worker loads

and where it has them

    missing() -> str                        what it needs and this machine lacks, in one line; "" when ready
    notes(out: Path) -> tuple[str, ...]     what a reader of its row should know about the folder that it built

`build` always runs in a process of its own (`make`): these tools configure the root logger, change the working
directory, keep whole models alive, and one of them is a script.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Protocol, cast

import edgec
from edgec import limits, plugins
from edgec.errors import BenchError, RuntimeUnavailableError, UsageError
from edgec.outputs import staged_folder, work_folder
from edgec.subprocesses import run

DENSE_ONNX = "dense-onnx"
DENSE_GGUF = "dense-gguf"
CHECKPOINT = "checkpoint"
SOURCES = (DENSE_ONNX, DENSE_GGUF, CHECKPOINT)
TOKENIZER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "sentence_bert_config.json",
)


class Baseline(Protocol):
    """What a file in this folder defines at module level."""

    TASKS: tuple[str, ...]
    NAME: str
    TOOL: str
    SOURCE: str

    def build(self, source: Path, out: Path) -> None: ...


def all_baselines() -> tuple[Baseline, ...]:
    return tuple(cast(Baseline, plugins.load(__name__, name)) for name in plugins.names(__name__))


def names(task: str) -> tuple[str, ...]:
    """Short names of the baselines for a task."""
    return tuple(b.NAME for b in all_baselines() if task in b.TASKS)


def get(name: str, task: str) -> Baseline:
    """The baseline `name` for `task`. Raises UsageError that lists the known ones."""
    found = [b for b in all_baselines() if name == b.NAME and task in b.TASKS]
    if found:
        return found[0]
    raise UsageError(f"unknown baseline {name!r} for {task}; known: {', '.join(names(task)) or 'none'}")


def require(name: str, task: str) -> Baseline:
    """The same, and everything that it needs is here. Raises RuntimeUnavailableError saying what is not."""
    baseline = get(name, task)
    missing = getattr(baseline, "missing", str)()
    if missing:
        raise RuntimeUnavailableError(f"baseline {name} ({baseline.TOOL}): {missing}")
    return baseline


def notes(name: str, task: str, out: Path) -> tuple[str, ...]:
    """What is worth knowing about a folder that `make` built: its tool first."""
    baseline = get(name, task)
    more: tuple[str, ...] = getattr(baseline, "notes", lambda _: ())(out)
    return (f"made by {baseline.TOOL}", *more)


def make(name: str, task: str, source: Path, out: Path, timeout_s: float = limits.BASELINE_TIMEOUT_S) -> Path:
    """Builds the baseline `name` from `source` into `out`, which appears whole or not at all; returns `out`.

    source: the folder that the baseline's `SOURCE` names. Raises OutputError when `out` exists,
    RuntimeUnavailableError where something that it needs is missing, BenchError with the tool's last words.
    """
    baseline = require(name, task)
    if not source.is_dir():
        raise BenchError(f"baseline {name}: {source} is not a folder; expected a {baseline.SOURCE} folder")
    with staged_folder(out) as stage, work_folder(out) as work:
        finished = run(
            [sys.executable, "-P", "-m", "edgec.bench.baselines", name, task, source.resolve(), stage],
            timeout_s=timeout_s,
            env=_environment(work),
            max_output_bytes=limits.MAX_TOOL_OUTPUT_BYTES,
        )
        if not finished.ok:
            raise BenchError(f"baseline {name} ({baseline.TOOL}) failed: {finished.reason()}")
    return out


def copy_tokenizer(source: Path, out: Path) -> None:
    """The small files beside an encoder's model that its loader reads."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _environment(work: Path) -> dict[str, str]:
    """work: for temporary files, which a tool that is stopped would leave behind."""
    root = str(Path(edgec.__file__).resolve().parents[1])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TMPDIR": str(work)}
