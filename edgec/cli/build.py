"""Verbs that make something: export, profile, plan, compress."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from edgec import console
from edgec.cli.options import (
    BUDGET_HELP,
    SEARCH_HELP,
    Calibration,
    Force,
    Json,
    MaxLatency,
    MaxLoss,
    Model,
    ProfileOption,
    SearchOption,
    Seed,
    TargetOption,
    app,
    out,
    peak_rss,
)
from edgec.errors import UsageError


@app.command()
def export(
    model: Model,
    target: Annotated[str | None, typer.Option("--target", "-t", help="what will run it: see `edgec targets`")] = None,
    budget: Annotated[str | None, typer.Option("--budget", "-b", help=BUDGET_HELP)] = None,
    output: Annotated[Path | None, typer.Option("--out", "-o", help="folder to write; default: MODEL-TARGET")] = None,
    plan: Annotated[
        str | None, typer.Option(help="plan.yaml, or a constraint: uniform:0.5[:FORMAT], dense:FORMAT")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML with any of these settings; options given beside it win")
    ] = None,
    calibration: Calibration = None,
    profile: ProfileOption = None,
    max_loss: MaxLoss = None,
    max_latency: MaxLatency = None,
    search: Annotated[str | None, typer.Option(help=SEARCH_HELP + "; default: greedy")] = None,
    heal: Annotated[
        str | None, typer.Option(help="distil the dense model into the compressed one: auto, off, 10min, 300steps")
    ] = None,
    heal_method: Annotated[
        str | None, typer.Option(help="full (the default), or lora: a low-rank change of every core")
    ] = None,
    device: Annotated[str, typer.Option(help="where healing runs: cpu, cuda")] = "cpu",
    seed: Annotated[int | None, typer.Option(min=0, help="of every random choice; default: 0")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="fit a --plan without activations (speed tests)")] = False,
    arithmetic: Annotated[
        str | None,
        typer.Option(help="of an ONNX encoder: int8 (fast in batches) or packed (less error); default: the target's"),
    ] = None,
    no_quality: Annotated[bool, typer.Option("--no-quality", help="skip the quality figures (random weights)")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compress MODEL for TARGET and write a folder that its runtime loads as it is, verified.

    Every layer gets the form that costs the least loss per byte: plain low-bit quantization where that is better,
    factored cores where they are. Whole plans are measured against one another and against the best uniform ones, and
    the best ships. What that lost is then healed by distillation from the dense model, for as long as --heal says; by
    default for five minutes at most, where there is something to heal.

    [dim]edgec export ./all-MiniLM-L6-v2 --target onnx-arm64

    edgec export ./llama --target onnx-x64 --budget 4bpw --calibration my-text.txt --heal 10min -o llama-4bpw[/dim]
    """
    from edgec import pipeline
    from edgec.heal.settings import parse_heal
    from edgec.plan.refine import parse_search
    from edgec.recipe import Recipe, read_recipe

    wanted = (read_recipe(recipe) if recipe else Recipe()).merged(
        target=target,
        budget=budget,
        max_loss=max_loss,
        max_latency=max_latency,
        plan=plan,
        search=search,
        heal=heal,
        heal_method=heal_method,
        seed=seed,
        arithmetic=arithmetic,
        calibration=calibration,
    )
    if wanted.target is None:
        raise UsageError("--target is missing; `edgec targets` lists them")
    folder = output or Path(f"{model.resolve().name}-{wanted.target}")
    healing = "off" if wanted.plan else "auto"  # who names every layer's form wants that form, as it is
    chosen = wanted.seed or 0
    request = pipeline.ExportRequest(
        model=model,
        target=wanted.target,
        out=folder,
        budget=wanted.budget,
        max_loss=wanted.max_loss,
        max_latency=wanted.max_latency,
        plan=wanted.plan,
        calibration=wanted.calibration,
        profile=profile,
        heal=parse_heal(wanted.heal or healing, method=wanted.heal_method or "full", device=device, seed=chosen),
        search=parse_search(wanted.search or "greedy", chosen),
        plain=plain,
        quality=not no_quality,
        force=force,
        arithmetic=wanted.arithmetic,
    )
    started = time.perf_counter()
    with console.progress() as bars:
        done = pipeline.export(request, bars)
    cost = {"seconds": round(time.perf_counter() - started, 1), "peak_rss_bytes": peak_rss()}
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
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="only this target's forms, in less time; may be repeated")
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
        found = pipeline.profile(
            model, output, targets=target or (), calibration=calibration, force=force, progress=bars
        )
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
    max_latency: MaxLatency = None,
    search: SearchOption = "greedy",
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option("--out", "-o", help="plan.yaml to write; default: print it")] = None,
    profile: ProfileOption = None,
    calibration: Calibration = None,
    as_json: Json = False,
) -> None:
    """Decide the form of every layer under a budget, and write YAML to read, edit and give to `compress --plan`."""
    from edgec import outputs, pipeline
    from edgec.plan.acceptance import parse_max_loss
    from edgec.plan.budget import parse_budget, parse_time
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
        parse_time(max_latency, "--max-latency") if max_latency else None,
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


@app.command("kv-cache")
def kv_cache(
    artifact: Annotated[Path, typer.Argument(help="a causal LM made by `edgec export` for onnx", show_default=False)],
    output: Annotated[Path, typer.Option("--out", "-o", help="folder to write")],
    calibration: Calibration = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Copy an ONNX artifact so that its keys and values are kept in int8, and measure what that costs.

    GGUF artifacts need no copy: `edgec run --kv-cache q8_0`.
    """
    from dataclasses import asdict

    from edgec.export.onnx.kv_cache import quantise

    if any(artifact.glob("*.gguf")):
        raise UsageError(f"{artifact} is GGUF: its cache is chosen when it is opened, with --kv-cache q8_0")
    with console.progress() as bars:
        made = quantise(artifact, output, calibration=calibration, force=force, progress=bars)
    if as_json:
        print(json.dumps(asdict(made)))
        return
    console.print_pairs(
        out,
        f"int8 KV cache of {artifact}",
        {
            "cache per token": f"{made.bytes_before} B → {made.bytes_after} B",
            "KL from before, nats per token": made.kl,
            "same likeliest token": made.top1,
            "measured on": f"{made.tokens} tokens of {made.text}",
        },
    )
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
