"""Session options: threads always set, spinning stated, telemetry off, and no training framework anywhere near."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

import edgec
from edgec.errors import UsageError
from edgec.runtime.options import RuntimeOptions, genai_overlay, physical_cores, refuse_kv_cache, session_options
from edgec.subprocesses import run

PACKAGE = Path(edgec.__file__).parent
FORBIDDEN = {"torch", "transformers", "onnx", "onnx_ir", "optimum", "safetensors"}
LEAN = ["edgec.runtime", "edgec.bench.worker", "edgec.bench.devices"]
LEAN_FILES = [*(PACKAGE / "runtime").glob("*.py"), *(PACKAGE / "bench" / "devices").glob("*.py")]


def test_threads_default_to_physical_cores() -> None:
    assert physical_cores() >= 1
    assert session_options(RuntimeOptions()).intra_op_num_threads == physical_cores()
    assert session_options(RuntimeOptions(threads=3)).intra_op_num_threads == 3
    overlay = genai_overlay(RuntimeOptions(threads=3, spin="never"))
    session = overlay["model"]["decoder"]["session_options"]
    assert session["intra_op_num_threads"] == 3 and session["session.intra_op.allow_spinning"] == "0"


@pytest.mark.parametrize("bad", [{"threads": -1}, {"threads": 10**6}, {"spin": "sometimes"}, {"kv_cache": "int8"}])
def test_nonsense_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        RuntimeOptions(**bad)  # type: ignore[arg-type]


def test_runtime_and_worker_import_without_any_training_framework() -> None:
    modules = [f"edgec.runtime.{p.stem}" for p in (PACKAGE / "runtime").glob("*.py") if p.stem != "__init__"]
    modules += [f"edgec.bench.devices.{p.stem}" for p in (PACKAGE / "bench/devices").glob("*.py")]
    code = (
        "import importlib, json, sys\n"
        f"for name in {LEAN + [m for m in modules if not m.endswith('__init__')]!r}: importlib.import_module(name)\n"
        "from edgec.runtime import ort_encoder, genai\n"
        "ort_encoder.prepare(); genai.prepare()\n"
        "print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))\n"
    )
    done = run([sys.executable, "-c", code], timeout_s=60)
    assert done.ok, done.reason()
    loaded = set(json.loads(done.stdout))
    assert not loaded & FORBIDDEN


@pytest.mark.parametrize("path", LEAN_FILES, ids=lambda p: p.name)
def test_no_file_even_mentions_one_in_an_import(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.partition(".")[0] not in FORBIDDEN
            assert not name.startswith("onnxruntime_genai.models")


def test_a_cache_that_the_files_decide_is_not_chosen_by_an_option() -> None:
    refuse_kv_cache(RuntimeOptions(), "onnxruntime")
    refuse_kv_cache(None, "onnxruntime")
    with pytest.raises(UsageError, match="onnxruntime keeps keys and values in the type"):
        refuse_kv_cache(RuntimeOptions(kv_cache="q8_0"), "onnxruntime")
