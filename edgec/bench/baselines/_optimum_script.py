"""Runs in the environment that has optimum-onnx, and therefore imports nothing of edgec: SOURCE OUT TASK.

Leaves the versions that made the export in OUT/optimum.json.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path


def main(source: str, out: str, task: str) -> None:
    from optimum.exporters.onnx import main_export

    main_export(
        source,
        output=Path(out),
        task=task,
        framework="pt",
        library_name="transformers",
        local_files_only=True,
        trust_remote_code=False,
        do_validation=False,
    )
    versions = {name: version(name) for name in ("optimum-onnx", "optimum", "transformers", "torch")}
    (Path(out) / "optimum.json").write_text(json.dumps(versions), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
