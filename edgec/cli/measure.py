"""Verbs that run and measure: eval, run, bench, frontier, advise."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from edgec import console
from edgec.cli.options import (
    Calibration,
    Force,
    Json,
    KvCache,
    Model,
    ProfileOption,
    SearchOption,
    Seed,
    TargetOption,
    app,
    out,
)
from edgec.errors import UsageError


@app.command("eval")
def evaluate(
    artifact: Annotated[
        Path, typer.Argument(help="folder made by `edgec export`, or a .gguf file", show_default=False)
    ],
    model: Annotated[Path, typer.Option("--model", "-m", help="the dense checkpoint to compare with")],
    sts: Annotated[
        Path | None, typer.Option(help="STS-Benchmark file: adds Spearman with its bootstrap interval")
    ] = None,
    calibration: Calibration = None,
    kv_cache: KvCache = "",
    as_json: Json = False,
) -> None:
    """Measure an artifact's quality against its dense model, on text that neither calibrated nor chose its plan."""
    from edgec import assess

    found = assess.evaluate(artifact, model, sts=sts, calibration=calibration, kv_cache=kv_cache)
    if as_json:
        print(json.dumps(found))
    else:
        console.print_pairs(out, f"{artifact} against {model}", found)


@app.command()
def run(
    artifact: Annotated[
        Path, typer.Argument(help="folder made by `edgec export`, or a .gguf file", show_default=False)
    ],
    text: Annotated[
        list[str] | None, typer.Argument(help="a prompt, or sentences; default: lines of standard input")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="causal LMs")] = 128,
    sample: Annotated[
        bool, typer.Option("--sample", help="sample instead of always taking the likeliest token")
    ] = False,
    temperature: Annotated[float | None, typer.Option("--temperature", "--temp", min=0, help="of --sample")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="of --sample; 0: all tokens")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="of --sample")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="of --sample")] = None,
    threads: Annotated[int, typer.Option(help="0: all physical cores")] = 0,
    kv_cache: KvCache = "",
    gpu: Annotated[int | None, typer.Option(min=0, help="number of the GPU to run on; default: the CPU")] = None,
    as_json: Json = False,
) -> None:
    """Generate text (causal LM) or print how similar sentences are (encoder; --json for the vectors)."""
    from edgec.runtime import RuntimeOptions, open_artifact
    from edgec.runtime.interfaces import CAUSAL_LM

    told = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "random_seed": seed}
    sampling = {name: value for name, value in told.items() if value is not None}
    if sampling and not sample:
        raise UsageError("--temperature, --top-k, --top-p and --seed are of --sample, which is not given")
    texts = text or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise UsageError("nothing to run: give a prompt or sentences, or pipe lines in")
    loaded: Any = open_artifact(artifact, RuntimeOptions(threads=threads, kv_cache=kv_cache, gpu=gpu))
    if loaded.task != CAUSAL_LM:
        if sample:
            raise UsageError(f"{artifact} holds a model for {loaded.task}: --sample is for causal LMs")
        vectors = loaded.embed(texts)
        if as_json:
            print(json.dumps({"embeddings": vectors.tolist()}))
        else:
            console.print_similarities(out, texts, vectors)
        return
    for prompt in texts:
        pieces = loaded.generate(prompt, max_new_tokens, greedy=not sample, **sampling)
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
    artifacts: Annotated[
        list[Path] | None, typer.Argument(help="folders made by `edgec export`, or .gguf files")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="dense checkpoint: for baselines and quality")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="dense peers made by other tools: fp32, int4, torch-eager, torch-compile, optimum; encoders: int8; "
            "causal LMs: int8, f16, q8_0, q4_k_m, q4_0 (repeat the option)"
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="random weights instead of a model: llama-3.2-1b, llama-300m")
    ] = None,
    plan: Annotated[str, typer.Option(help="with --shape: the constraint to export")] = "uniform:0.5",
    target: Annotated[
        list[str] | None,
        typer.Option(help="with --shape: what to export to (repeat the option); default: onnx-x64", show_default=False),
    ] = None,
    smaller: Annotated[
        list[Path] | None, typer.Option(help="a smaller dense model as a contestant (repeat the option)")
    ] = None,
    smaller_as: Annotated[
        str, typer.Option(help="the baseline that makes it; default: int8 (encoder), int4 (causal LM)")
    ] = "",
    sts: Annotated[Path | None, typer.Option(help="STS-Benchmark file: Spearman beside the speed")] = None,
    calibration: Calibration = None,
    threads: Annotated[int, typer.Option(help="0: all physical cores")] = 0,
    device: Annotated[str, typer.Option(help="where to measure; `edgec doctor` lists the kinds")] = "local",
    cores: Annotated[int, typer.Option(min=0, help="local: physical cores to run on; 0: all")] = 0,
    ram_limit: Annotated[str | None, typer.Option("--ram-limit", help="local: private memory, 512MB, 2GB")] = None,
    kv_cache: Annotated[
        list[str] | None,
        typer.Option(help="measure GGUF artifacts with this KV cache, f16 or q8_0 (repeat the option to compare)"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="fresh processes per contestant")] = 5,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="causal LMs: prompt length")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="causal LMs: generated length")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="encoders: sentences per batch")] = 32,
    report: Annotated[Path | None, typer.Option(help="write one self-contained HTML file")] = None,
    markdown: Annotated[Path | None, typer.Option("--md", help="write the table as Markdown")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="write a line per contestant and figure")] = None,
    frontier: Annotated[Path | None, typer.Option(help="with --report: a frontier.json, drawn beside the plan")] = None,
    profile: ProfileOption = None,
    work: Annotated[
        Path | None, typer.Option(help="keep baselines and shapes here instead of a temporary folder")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure artifacts against dense baselines: each measurement a fresh process, contestants interleaved, medians and
    spread.

    [dim]edgec bench minilm-onnx-x64 --model ./all-MiniLM-L6-v2 --baseline fp32 --baseline int8 --report report.html

    edgec bench --shape llama-3.2-1b --target onnx-x64 --target gguf-factored --baseline int4 --baseline q4_0[/dim]
    """
    from edgec import assess
    from edgec.bench.devices import open_device
    from edgec.bench.harness import BenchSettings
    from edgec.contestants import ShapeRequest

    if bool(artifacts) == bool(shape):
        raise UsageError("give artifact folders or --shape, one of the two")
    if shape and (model or sts or calibration or smaller or kv_cache):
        raise UsageError("--model, --sts, --calibration, --smaller and --kv-cache are for artifacts, not for --shape")
    if (sts or calibration) and artifacts and not model:
        raise UsageError("--sts and --calibration measure quality, against --model: the dense checkpoint")
    if smaller_as and not smaller:
        raise UsageError("--smaller-as says which baseline makes a --smaller model, and none is given")
    if target and not shape:
        raise UsageError("--target says what a --shape is exported to; finished artifacts have one")
    first = artifacts[0] if artifacts else None
    files = console.BenchFiles(report, markdown, csv, frontier=frontier, profile=profile, artifact=first)
    held = [f"cores={cores}"] if cores else []
    held += [f"ram={ram_limit}"] if ram_limit else []
    if held and device != "local":
        raise UsageError("--cores and --ram-limit hold this machine back; they need --device local")
    settings = BenchSettings(
        device=f"local:{','.join(held)}" if held else device,
        threads=threads,
        rounds=rounds,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
    )
    opened = open_device(settings.device)
    machine = console.machine(opened)
    costs: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="edgec-bench-") as temporary, console.progress() as bars:
        folder = work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if shape:
            wanted = ShapeRequest(shape, plan, tuple(target or ("onnx-x64",)), tuple(baseline or ("int4",)))
            rows, costs = assess.bench_shape(wanted, settings, folder, bars, opened)
        else:
            request = assess.BenchRequest(
                tuple(artifacts or ()),
                settings,
                folder,
                model,
                tuple(baseline or ()),
                sts,
                calibration,
                tuple(smaller or ()),
                smaller_as,
                tuple(kv_cache or ()),
            )
            rows = assess.bench(request, bars, opened)
    console.print_bench(out, rows, costs, machine, as_json=as_json)
    written = console.write_bench_files(rows, tuple(artifacts or ()), files, machine)
    for path in () if as_json else written:
        console.line(out, f"wrote {path}")


@app.command()
def shadow(
    model: Model,
    artifact: Annotated[Path, typer.Argument(help="folder made by `edgec export`", show_default=False)],
    traffic: Annotated[Path, typer.Option(help='.jsonl: one string, or {"prompt": …}, per line')],
    worst: Annotated[int, typer.Option(min=0, help="cases to show, the most divergent first")] = 5,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="prompts to replay, from the start of the file")] = 200,
    max_tokens: Annotated[int, typer.Option(min=1, help="causal LMs: kept of each prompt")] = 512,
    new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=0, help="causal LMs: greedy answer")] = 32,
    as_json: Json = False,
) -> None:
    """Replay real prompts through the dense MODEL and an artifact, and show where they part, the worst cases to read.

    [dim]edgec shadow ./llama llama-onnx-x64 --traffic prompts.jsonl[/dim]
    """
    from edgec import shadow as room

    prompts = room.read_traffic(traffic, limit)
    with console.progress() as bars:
        found = room.shadow(model, artifact, prompts, max_tokens=max_tokens, new_tokens=new_tokens, progress=bars)
    if as_json:
        print(json.dumps(found.as_dict(), allow_nan=False))
        return
    console.print_pairs(out, f"{artifact} against {model}, prompt by prompt", found.summary())
    for case in found.worst(worst):
        console.line(out, f"line {case.line}: {case.divergence:.4g} over {case.tokens} tokens")
        console.line(out, f"  prompt    {case.prompt[:200]!r}", dim=True)
        if case.differs_at is not None:
            console.line(out, f"  dense     {case.dense[:200]!r}", dim=True)
            console.line(out, f"  artifact  {case.artifact[:200]!r} (differs from token {case.differs_at})", dim=True)


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
    host_ram: Annotated[
        str | None, typer.Option("--host-ram", help="slower memory of the host, where a KV cache could go")
    ] = None,
    pooled_ram: Annotated[str | None, typer.Option("--pooled-ram", help="the same for pooled (CXL) memory")] = None,
    as_json: Json = False,
) -> None:
    """Say whether to deploy, and what: as it is, quantised, factored, or a smaller model; with the arithmetic.

    [dim]edgec advise ./llama --target onnx-x64 --ram 2GB --latency 30ms[/dim]
    """
    from edgec import advise as advising
    from edgec import console_advice

    request = advising.AdviceRequest(
        model,
        target,
        ram,
        latency,
        max_loss,
        context,
        batch,
        threads,
        profile,
        calibration,
        smaller,
        measured,
        measure,
        host_ram,
        pooled_ram,
    )
    with console.progress() as bars:
        found = advising.advise(request, bars)
    if as_json:
        print(json.dumps(console_advice.advice_summary(found), allow_nan=False))
    else:
        console_advice.print_advice(out, found)


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
    profile: ProfileOption = None,
    search: SearchOption = "greedy",
    seed: Seed = 0,
    heal: Annotated[
        str, typer.Option(help="heal plans and the best rivals alike for this long: off, 2min, 200steps")
    ] = "off",
    heal_method: Annotated[str, typer.Option(help="full, or lora")] = "full",
    device: Annotated[str, typer.Option(help="where healing runs: cpu, cuda")] = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Sweep budgets and measure edgec's plans beside every other method, on the same layers and text.

    Writes the table (frontier.md), the plot (frontier.svg, frontier.html) and every number (frontier.json).

    [dim]edgec frontier ./all-MiniLM-L6-v2 --bits 4,3,2 --calibration train.txt --sts sts-dev.csv[/dim]
    """
    from edgec import frontier as room
    from edgec.heal.settings import parse_heal
    from edgec.peers import chosen
    from edgec.plan.refine import parse_search
    from edgec.report.frontier_tables import to_json

    request = room.FrontierRequest(
        model=model,
        target=target,
        bits=room.parse_bits(bits),
        calibration=calibration,
        sts=sts,
        eval_text=eval_text,
        peers=chosen(peers),
        heal=parse_heal(heal, method=heal_method, device=device, seed=seed),
        profile=profile,
        search=parse_search(search, seed),
    )
    with console.progress() as bars:
        found = room.run_and_write(request, output, bars, force=force)
    if as_json:
        print(to_json(found, indent=None), end="")
    else:
        console.print_frontier(out, found, output)
