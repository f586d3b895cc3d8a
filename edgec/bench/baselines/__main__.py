"""`python -m edgec.bench.baselines NAME TASK SOURCE OUT`: builds one baseline in this process (see `make`)."""

from __future__ import annotations

import sys
from pathlib import Path

from edgec.bench.baselines import get
from edgec.errors import EdgecError


def main(arguments: list[str]) -> int:
    name, task, source, out = arguments
    try:
        get(name, task).build(Path(source), Path(out))
    except EdgecError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
