"""Verbs that look: inspect, targets, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edgec import console
from edgec.cli.options import (
    Json,
    app,
    out,
)


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="an artifact, a compressed folder, a profile or a checkpoint", show_default=False)
    ],
    check: Annotated[bool, typer.Option("--check", help="compare every file with the hash in the manifest")] = False,
    as_json: Json = False,
) -> None:
    """Say what a folder is: provenance, sizes, the plan layer by layer, parity and quality as measured at export."""
    from edgec import inspection

    found = inspection.inspect(path, check=check)
    if as_json:
        print(json.dumps(found.summary))
    else:
        console.print_inspection(out, found)


@app.command()
def targets(
    name: Annotated[str | None, typer.Argument(help="one target, in full")] = None, as_json: Json = False
) -> None:
    """List the targets, or what one of them executes."""
    from edgec.export.targets import all_targets, get_target
    from edgec.records import as_dict

    chosen = [get_target(name)] if name else list(all_targets().values())
    if as_json:
        print(json.dumps([as_dict(target) for target in chosen]))
    else:
        console.print_targets(out, chosen, full=name is not None)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this installation: versions, devices and what they need, memory, disk, and a tiny model end to end."""
    from edgec import inspection

    with console.progress() as bars:
        findings = inspection.doctor(bars)
    if as_json:
        fields = [{"check": f.check, "ok": f.ok, "detail": f.detail, "absent": f.optional} for f in findings]
        print(json.dumps(fields))
    else:
        console.print_findings(out, findings)
    if not all(f.ok for f in findings):
        raise typer.Exit(1)
