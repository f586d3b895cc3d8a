"""The command line: parse, call, print; no logic. Results go to stdout, progress and errors to stderr.

Heavy libraries are imported inside the verbs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from edgec import console
from edgec._version import __version__
from edgec.errors import EdgecError, UsageError

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

Model = Annotated[
    Path, typer.Argument(help="transformers folder: config.json, *.safetensors, tokenizer", show_default=False)
]
TargetOption = Annotated[str, typer.Option("--target", "-t", help="what will run it: see `edgec targets`")]
Calibration = Annotated[
    Path | None,
    typer.Option(help=".txt or .jsonl of text like the model will see; default: prose from the Python library"),
]
ProfileOption = Annotated[
    Path | None, typer.Option("--profile", help="folder made by `edgec profile` of this very model")
]
Force = Annotated[bool, typer.Option("--force", help="replace an existing output that edgec wrote")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")]
MaxLoss = Annotated[
    str | None,
    typer.Option("--max-loss", help="in place of a budget: the smallest within 1% (1 - cosine, or rise of perplexity)"),
]
SearchOption = Annotated[
    str, typer.Option("--search", help="none, greedy, or anneal with its time: anneal:10min (plans are measured)")
]
Seed = Annotated[int, typer.Option(help="of every random choice")]
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
    _STATE["debug"] = debug


_STATE = {"debug": "--debug" in sys.argv}


@app.command()
def export(
    model: Model,
    target: Annotated[str | None, typer.Option("--target", "-t", help="what will run it: see `edgec targets`")] = None,
    budget: Annotated[str | None, typer.Option("--budget", "-b", help=BUDGET_HELP)] = None,
    output: Annotated[Path | None, typer.Option("--out", "-o", help="folder to write; default: MODEL-TARGET")] = None,
    plan: Annotated[
        str | None, typer.Option(help="plan.yaml, or a constraint: uniform:0.5[:FORMAT], dense:FORMAT")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML with target, budget, plan and calibration")] = None,
    calibration: Calibration = None,
    profile: ProfileOption = None,
    max_loss: MaxLoss = None,
    search: SearchOption = "greedy",
    heal: Annotated[
        str | None, typer.Option(help="distil the dense model into the compressed one: auto, off, 10min, 300steps")
    ] = None,
    heal_method: Annotated[str, typer.Option(help="full, or lora: a low-rank change of every core")] = "full",
    device: Annotated[str, typer.Option(help="where healing runs: cpu, cuda")] = "cpu",
    seed: Seed = 0,
    plain: Annotated[bool, typer.Option("--plain", help="fit a --plan without activations (speed tests)")] = False,
    no_quality: Annotated[bool, typer.Option("--no-quality", help="skip the quality figures (random weights)")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compress MODEL for TARGET and write a folder that its runtime loads as it is, verified.

    Every layer gets the form that costs the least loss per byte: plain low-bit quantization where that is better,
    factored cores where they are. Whole plans are measured against one another and against the best uniform ones, and
    the best ships. What that lost is then healed by distillation from the dense model, for as long as --heal says; by
    default for five minutes at most, where there is something to heal.

    [dim]edgec export ./all-MiniLM-L6-v2 --target onnx-arm64 edgec export ./llama --target onnx-x64 --budget 4bpw
    --calibration my-text.txt -o llama-4bpw[/dim]
    """
    from edgec import pipeline
    from edgec.heal.settings import parse_heal
    from edgec.plan.refine import parse_search
    from edgec.recipe import Recipe, read_recipe

    wanted = (read_recipe(recipe) if recipe else Recipe()).merged(
        target=target, budget=budget, max_loss=max_loss, plan=plan, calibration=calibration, heal=heal
    )
    if wanted.target is None:
        raise UsageError("--target is missing; `edgec targets` lists them")
    folder = output or Path(f"{model.resolve().name}-{wanted.target}")
    healing = "off" if wanted.plan else "auto"  # who names every layer's form wants that form, as it is
    request = pipeline.ExportRequest(
        model=model,
        target=wanted.target,
        out=folder,
        budget=wanted.budget,
        max_loss=wanted.max_loss,
        plan=wanted.plan,
        calibration=wanted.calibration,
        profile=profile,
        heal=parse_heal(wanted.heal or healing, method=heal_method, device=device, seed=seed),
        search=parse_search(search, seed),
        plain=plain,
        quality=not no_quality,
        force=force,
    )
    started = time.perf_counter()
    with console.progress() as bars:
        done = pipeline.export(request, bars)
    cost = {"seconds": round(time.perf_counter() - started, 1), "peak_rss_bytes": _peak_rss()}
    if as_json:
        print(json.dumps({"out": str(done.out), **cost, "manifest": done.manifest}))
    else:
        console.print_export(out, done, cost)


@app.command()
def profile(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="folder to keep; export and plan take it as --profile")
    ] = None,
    calibration: Calibration = None,
    plot: Annotated[Path | None, typer.Option(help="write the entropies as a picture (.svg, .png or .pdf)")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure every layer: entanglement entropy at each cut, and the error of every candidate form.

    The entropy S of a weight's normalised squared singular values says how many bond states χ ≳ exp(S) a low-rank or
    tensor-train form needs there. A layer whose entropy is that of a random matrix has nothing to find and is left
    dense.
    """
    from edgec import pipeline

    with console.progress() as bars:
        found = pipeline.profile(model, output, calibration=calibration, force=force, progress=bars)
    if plot is not None:
        console.plot_entropies(found, plot)
    if as_json:
        print(json.dumps(console.profile_summary(found)))
    else:
        console.print_profile(out, found, output, plot)


@app.command()
def plan(
    model: Model,
    target: TargetOption,
    budget: Annotated[str | None, typer.Option("--budget", "-b", help=BUDGET_HELP)] = None,
    max_loss: MaxLoss = None,
    search: SearchOption = "greedy",
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option("--out", "-o", help="plan.yaml to write; default: print it")] = None,
    profile: ProfileOption = None,
    calibration: Calibration = None,
    as_json: Json = False,
) -> None:
    """Decide the form of every layer under a budget, and write it as YAML to read, edit and give to `compress --plan`.
    """
    from edgec import outputs, pipeline
    from edgec.plan.acceptance import parse_max_loss
    from edgec.plan.budget import parse_budget
    from edgec.plan.files import write_plan
    from edgec.plan.refine import parse_search
    from edgec.records import as_dict
    from edgec.report import plan_table

    if bool(budget) == bool(max_loss):
        raise UsageError("give --budget (a size) or --max-loss (a line), one of the two")
    goal = pipeline.Goal(
        parse_budget(budget) if budget else None,
        parse_max_loss(max_loss) if max_loss else None,
        parse_search(search, seed),
    )
    with console.progress() as bars:
        made = pipeline.plan(model, target, goal, profile_folder=profile, calibration=calibration, progress=bars)
    if output is not None:
        with outputs.written_file(output) as temporary:
            temporary.write_text(write_plan(made), encoding="utf-8")
    if as_json:
        print(json.dumps(as_dict(made)))
    elif output is None:
        print(write_plan(made), end="")
    else:
        out.print(plan_table(made))
        for note in made.notes:
            console.line(out, f"  {note}", dim=True)
        console.line(out, f"wrote {output}")


@app.command()
def compress(
    model: Model,
    plan: Annotated[str, typer.Option(help="plan.yaml, or a constraint: uniform:0.5[:FORMAT], dense:FORMAT")],
    output: Annotated[Path, typer.Option("--out", "-o", help="folder to write")],
    target: TargetOption = "onnx-x64",
    profile: ProfileOption = None,
    calibration: Calibration = None,
    plain: Annotated[bool, typer.Option("--plain", help="fit without activations")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fit a plan and keep the factors in safetensors: `edgec.load(OUT)` in Python, or `edgec export OUT` later."""
    from edgec import pipeline
    from edgec.records import as_dict
    from edgec.report import plan_table

    with console.progress() as bars:
        made = pipeline.compress(
            model,
            output,
            plan,
            target=target,
            profile_folder=profile,
            calibration=calibration,
            plain=plain,
            force=force,
            progress=bars,
        )
    if as_json:
        print(json.dumps({"out": str(output), "plan": as_dict(made)}))
    else:
        out.print(plan_table(made))
        console.line(out, f"wrote {output}")


@app.command("eval")
def evaluate(
    artifact: Annotated[Path, typer.Argument(help="folder made by `edgec export`", show_default=False)],
    model: Annotated[Path, typer.Option("--model", "-m", help="the dense checkpoint to compare with")],
    sts: Annotated[
        Path | None, typer.Option(help="STS-Benchmark file: adds Spearman with its bootstrap interval")
    ] = None,
    calibration: Calibration = None,
    as_json: Json = False,
) -> None:
    """Measure an artifact's quality against its dense model, on text that neither calibrated nor chose its plan."""
    from edgec import assess

    found = assess.evaluate(artifact, model, sts=sts, calibration=calibration)
    if as_json:
        print(json.dumps(found))
    else:
        console.print_pairs(out, f"{artifact} against {model}", found)


@app.command()
def run(
    artifact: Annotated[Path, typer.Argument(help="folder made by `edgec export`", show_default=False)],
    text: Annotated[
        list[str] | None, typer.Argument(help="a prompt, or sentences; default: lines of standard input")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="causal LMs")] = 128,
    sample: Annotated[
        bool, typer.Option("--sample", help="sample instead of always taking the likeliest token")
    ] = False,
    threads: Annotated[int, typer.Option(help="0: all physical cores")] = 0,
    as_json: Json = False,
) -> None:
    """Generate text (causal LM) or print how similar sentences are (encoder; --json for the vectors)."""
    from edgec.runtime import RuntimeOptions, open_artifact
    from edgec.runtime.interfaces import CAUSAL_LM

    texts = text or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise UsageError("nothing to run: give a prompt or sentences, or pipe lines in")
    loaded: Any = open_artifact(artifact, RuntimeOptions(threads=threads))
    if loaded.task != CAUSAL_LM:
        vectors = loaded.embed(texts)
        if as_json:
            print(json.dumps({"embeddings": vectors.tolist()}))
        else:
            console.print_similarities(out, texts, vectors)
        return
    for prompt in texts:
        pieces = loaded.generate(prompt, max_new_tokens, greedy=not sample)
        if as_json:
            found = list(pieces)
            print(
                json.dumps(
                    {"prompt": prompt, "tokens": [p.token for p in found], "text": "".join(p.text for p in found)}
                )
            )
            continue
        sys.stdout.write(prompt)
        for piece in pieces:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        sys.stdout.write("\n")


@app.command()
def bench(
    artifacts: Annotated[list[Path] | None, typer.Argument(help="folders made by `edgec export`")] = None,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="dense checkpoint: for baselines and quality")
    ] = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help="dense peers made by other tools: fp32, int8, int4 (repeat the option)")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="random weights instead of a model: llama-3.2-1b, llama-300m")
    ] = None,
    plan: Annotated[str, typer.Option(help="with --shape: the constraint to export")] = "uniform:0.5",
    sts: Annotated[Path | None, typer.Option(help="STS-Benchmark file: Spearman beside the speed")] = None,
    calibration: Calibration = None,
    threads: Annotated[int, typer.Option(help="0: all physical cores")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="fresh processes per contestant")] = 5,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="causal LMs: prompt length")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="causal LMs: generated length")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="encoders: sentences per batch")] = 32,
    report: Annotated[Path | None, typer.Option(help="write one self-contained HTML file")] = None,
    work: Annotated[
        Path | None, typer.Option(help="keep baselines and shapes here instead of a temporary folder")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure artifacts against dense baselines: each measurement a fresh process, contestants interleaved, medians and
    spread.

    [dim]edgec bench minilm-onnx-x64 --model ./all-MiniLM-L6-v2 --baseline fp32 --baseline int8 --report report.html
    edgec bench --shape llama-3.2-1b[/dim]
    """
    from edgec import assess
    from edgec.bench.harness import BenchSettings

    if bool(artifacts) == bool(shape):
        raise UsageError("give artifact folders or --shape, one of the two")
    settings = BenchSettings(
        threads=threads, rounds=rounds, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch
    )
    costs: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="edgec-bench-") as temporary, console.progress() as bars:
        folder = work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if shape:
            rows, costs = assess.bench_shape(shape, plan, settings, folder, bars)
        else:
            request = assess.BenchRequest(
                tuple(artifacts or ()), settings, folder, model, tuple(baseline or ()), sts, calibration
            )
            rows = assess.bench(request, bars)
    console.print_bench(out, rows, costs, as_json=as_json)
    if report is not None:
        console.write_bench_report(report, rows, tuple(artifacts or ()), ["edgec " + " ".join(sys.argv[1:])])
        if not as_json:
            console.line(out, f"wrote {report}")


@app.command()
def advise(
    model: Model,
    target: TargetOption,
    ram: Annotated[str, typer.Option(help="memory of the whole process: 512MB, 2GB")],
    latency: Annotated[str | None, typer.Option(help="per token (causal LM) or sentence (encoder): 30ms, 0.5s")] = None,
    max_loss: Annotated[str, typer.Option("--max-loss", help="acceptable: 1 − cosine, or rise of perplexity")] = "1%",
    context: Annotated[int, typer.Option(min=0, help="tokens of one sequence; 0: 2048 (causal LM), 32 (encoder)")] = 0,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="sequences at once")] = 1,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="0: all physical cores")] = 0,
    profile: ProfileOption = None,
    calibration: Calibration = None,
    smaller: Annotated[Path | None, typer.Option(help="a smaller checkpoint to weigh against this one")] = None,
    measured: Annotated[Path | None, typer.Option(help="output of `edgec bench --json` on the target")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="measure every plan's loss end to end (minutes)")] = False,
    as_json: Json = False,
) -> None:
    """Say whether to deploy, and what: as it is, quantised, factored, or a smaller model; with the arithmetic.

    [dim]edgec advise ./llama --target onnx-x64 --ram 2GB --latency 30ms[/dim]
    """
    from edgec import advise as advising
    from edgec import console_advice

    request = advising.AdviceRequest(
        model, target, ram, latency, max_loss, context, batch, threads, profile, calibration, smaller, measured, measure
    )
    with console.progress() as bars:
        found = advising.advise(request, bars)
    if as_json:
        print(json.dumps(console_advice.advice_summary(found), allow_nan=False))
    else:
        console_advice.print_advice(out, found)


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
    """Check this installation: versions, runtimes, CPU features, memory, disk, and a tiny model end to end."""
    from edgec import inspection

    with console.progress() as bars:
        findings = inspection.doctor(bars)
    if as_json:
        print(json.dumps([{"check": f.check, "ok": f.ok, "detail": f.detail} for f in findings]))
    else:
        console.print_findings(out, findings)
    if not all(f.ok for f in findings):
        raise typer.Exit(1)


@app.command()
def frontier(
    model: Model,
    target: TargetOption = "onnx-x64",
    bits: Annotated[str, typer.Option(help="budgets to sweep, bits per weight of the block linears")] = "5,4,3,2.5,2",
    output: Annotated[Path, typer.Option("--out", "-o", help="folder to write")] = Path("frontier-out"),
    calibration: Calibration = None,
    sts: Annotated[Path | None, typer.Option(help="encoders: STS-Benchmark file that quality is measured on")] = None,
    eval_text: Annotated[
        Path | None, typer.Option(help="held-out text to measure on; default: a part of the calibration text")
    ] = None,
    peers: Annotated[str, typer.Option(help="all, none, or some: rtn,gptq,svd,svd_llm,tt,ggml")] = "all",
    heal: Annotated[str, typer.Option(help="off")] = "off",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Sweep budgets and measure edgec's plans beside every other method, on the same layers and text.

    Writes the table (frontier.md), the plot (frontier.svg, frontier.html) and every number (frontier.json).

    [dim]edgec frontier ./all-MiniLM-L6-v2 --bits 4,3,2 --calibration train.txt --sts sts-dev.csv[/dim]
    """
    from edgec import frontier as room
    from edgec.peers import chosen
    from edgec.report.frontier_tables import to_json

    request = room.FrontierRequest(
        model=model,
        target=target,
        bits=room.parse_bits(bits),
        calibration=calibration,
        sts=sts,
        eval_text=eval_text,
        peers=chosen(peers),
        heal=heal,
    )
    with console.progress() as bars:
        found = room.run_and_write(request, output, bars, force=force)
    if as_json:
        print(to_json(found, indent=None), end="")
    else:
        console.print_frontier(out, found, output)


def _peak_rss() -> int:
    """Peak resident memory of this process [bytes]."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line; every failure is one line on stderr and an exit code that is not 0."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    given = sys.argv[1:] if argv is None else argv
    if "--debug" in given:  # wherever it stands: people append it to the command that failed
        given = ["--debug", *(word for word in given if word != "--debug")]
    code = 1
    try:
        code = int(app(args=given, prog_name="edgec", standalone_mode=False) or 0)
        if code == 130:  # how typer reports Ctrl-C
            raise KeyboardInterrupt
    except EdgecError as error:
        code = _fail(str(error), error.exit_code)
    except typer.Exit as stop:
        code = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted; no output was changed", 130)
    except MemoryError:
        code = _fail(_OUT_OF_MEMORY, 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        code = _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), 1)
    except Exception as error:  # noqa: BLE001  the last line of defence: a bug is one line too, unless --debug
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            code = 2
        elif type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            code = _fail(f"{error.format_message().rstrip('.')}; see `{_help_command(error)}`", 2)
        elif "not enough memory" in str(error):  # torch's allocator
            code = _fail(_OUT_OF_MEMORY, 1)
        else:
            code = _fail(f"internal error: {type(error).__name__}: {error} (run again with --debug, and report it)", 70)
    sys.exit(code)


_OUT_OF_MEMORY = "out of memory; close other programs, or choose a smaller model"


def _fail(message: str, code: int) -> int:
    if _STATE["debug"] and sys.exc_info()[0] is not None:
        logging.getLogger(__name__).exception("failed")
    sys.stderr.write(f"edgec: error: {console.printable(message)}\n")
    return code


def _help_command(error: Any) -> str:
    """What shows the help for the verb that an error of typer's comes from."""
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context else 'edgec'} --help"
