"""`python -m runtime_tests.arm64`: makes the arm64 root, once, and prints its folder (`--device qemu-arm64:FOLDER`)."""

from __future__ import annotations

import sys

from runtime_tests.arm64.build import BrokenRootError, PackagesOutOfReachError, ensure_root

if __name__ == "__main__":
    try:
        sys.stdout.write(f"{ensure_root()}\n")
    except (BrokenRootError, PackagesOutOfReachError) as error:
        sys.exit(str(error))
