"""The import contracts of pyproject.toml hold: rooms import downwards, and what a device runs stays light."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

from edgec.subprocesses import run

ROOT = Path(__file__).resolve().parents[1]


def test_import_contracts_hold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize("module", ["edgec.runtime", "edgec.bench.worker", "edgec.bench.devices"])
def test_device_side_loads_no_torch(module: str) -> None:
    """The contract reads import statements; this also sees what third-party packages pull in."""
    heavy = "[m for m in ('torch', 'transformers', 'onnx') if m in sys.modules]"
    done = run([sys.executable, "-c", f"import sys, {module}; print({heavy})"], timeout_s=60)
    assert (done.returncode, done.stdout.strip()) == (0, b"[]"), done.stderr
