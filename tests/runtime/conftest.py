from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import artifacts_for_tests as artifacts


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Path:
    return artifacts.encoder(tmp_path / "encoder", pooled=True)


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifacts.tiny_lm(tmp_path_factory.getbasetemp())
