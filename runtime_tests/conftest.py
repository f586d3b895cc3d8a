"""Fixtures that the runtime tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime_tests.arm64.build import PackagesOutOfReachError, ensure_root
from runtime_tests.arm64.root import Arm64Root
from runtime_tests.models import AbsentModelError, export_for_arm64, minilm_folder, stories_folder


@pytest.fixture(scope="session")
def arm64_root() -> Arm64Root:
    """The aarch64 onnxruntime under qemu-user; skips where its packages are out of reach.

    With EDGEC_REQUIRE_ARM64=1 that is a failure: for a machine which is known to have them.
    """
    try:
        return Arm64Root(ensure_root())
    except PackagesOutOfReachError as error:
        if os.environ.get("EDGEC_REQUIRE_ARM64") == "1":
            pytest.fail(f"EDGEC_REQUIRE_ARM64 is set, but: {error}")
        pytest.skip(f"no arm64 runtime: {error}")


@pytest.fixture(scope="session")
def stories() -> Path:
    """stories260K, a real Llama outside the repository."""
    try:
        return stories_folder()
    except AbsentModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real all-MiniLM-L6-v2, from the extra [demo]."""
    try:
        return minilm_folder()
    except AbsentModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def minilm_arm64_artifact(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_for_arm64(minilm, "dense:int4-b32", tmp_path_factory.mktemp("arm64") / "minilm")


@pytest.fixture(scope="session")
def minilm_arm64_factored(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_for_arm64(minilm, "uniform:0.5", tmp_path_factory.mktemp("arm64") / "minilm-half")


@pytest.fixture(scope="session")
def minilm_arm64_fp32(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_for_arm64(minilm, "dense:fp32", tmp_path_factory.mktemp("arm64") / "minilm-fp32")


@pytest.fixture(scope="session")
def stories_arm64_artifact(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_for_arm64(stories, "dense:int4-b32", tmp_path_factory.mktemp("arm64") / "stories")


@pytest.fixture(scope="session")
def stories_arm64_fp32(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_for_arm64(stories, "dense:fp32", tmp_path_factory.mktemp("arm64") / "stories-fp32")
