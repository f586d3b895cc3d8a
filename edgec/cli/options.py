"""What all verbs share: the application, its own options, and the types of options that several verbs take."""

from __future__ import annotations

import logging
import os
import resource
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from edgec._version import __version__

app = typer.Typer(
    name="edgec",
    help="Compress a trained transformer into what a phone, a laptop or an offline server runs, and measure it.\n\n"
    "Start with: edgec export MODEL --target onnx-arm64",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# Pipes and files get the width that tables are made for.
out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100)


def _model_folder(model: Path | None) -> Path | None:
    """A .gguf in the place of MODEL becomes a transformers folder here, so that no verb needs to know."""
    from edgec.gguf_header import is_gguf

    if model is None or not is_gguf(model):
        return model
    from edgec import gguf_in

    return gguf_in.resolve(model)


Model = Annotated[
    Path,
    typer.Argument(
        help="transformers folder: config.json, *.safetensors, tokenizer; or a dense .gguf",
        show_default=False,
        callback=_model_folder,
    ),
]
TargetOption = Annotated[str, typer.Option("--target", "-t", help="what will run it: see `edgec targets`")]
Calibration = Annotated[
    Path | None,
    typer.Option(help=".txt or .jsonl of text like the model will see; default: prose from the Python library"),
]
ProfileOption = Annotated[
    Path | None, typer.Option("--profile", help="folder made by `edgec profile` of this very model")
]
KvCache = Annotated[
    str, typer.Option("--kv-cache", help="GGUF: type of keys and values, f16 or q8_0; default: the runtime's own")
]
Force = Annotated[bool, typer.Option("--force", help="replace an existing output that edgec wrote")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")]
MaxLoss = Annotated[
    str | None,
    typer.Option("--max-loss", help="in place of a budget: the smallest within 1% (1 - cosine, or rise of perplexity)"),
]
MaxLatency = Annotated[
    str | None,
    typer.Option("--max-latency", help="most time of the planned layers, as kernels timed here predict it: 5ms"),
]
SEARCH_HELP = "none, greedy (24 plans are measured; greedy:30s ends by the clock too) or anneal:10min"
SearchOption = Annotated[str, typer.Option("--search", help=SEARCH_HELP)]
Seed = Annotated[int, typer.Option(min=0, help="of every random choice")]
BUDGET_HELP = "12MB (the whole folder), 0.3 (of dense fp16), 4bpw (total) or 4bpw-linear (block linears; rest int8)"


def _version(value: bool) -> None:
    if value:
        out.print(f"edgec {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks and every log line")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="show what each stage decides")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    level = logging.DEBUG if debug else logging.WARNING
    logging.basicConfig(level=level, format="edgec: %(levelname)s: %(message)s", stream=sys.stderr)
    if verbose or debug:
        logging.getLogger("edgec").setLevel(logging.DEBUG if debug else logging.INFO)
    STATE["debug"] = debug


STATE = {"debug": "--debug" in sys.argv}


def peak_rss() -> int:
    """Peak resident memory of this process [bytes]."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
