"""Fixtures that the runtime tests share."""

from __future__ import annotations

import os

import pytest

from runtime_tests.arm64.build import PackagesOutOfReachError, ensure_root
from runtime_tests.arm64.root import Arm64Root


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
