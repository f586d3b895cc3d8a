"""What people see in a terminal: bars, tables that fit 100 columns, sizes in MB. Prints results, computes none."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from edgec.bench.devices import Device
from edgec.errors import UsageError
from edgec.records import MANIFEST_NAME, Measurement, Target


class Bars:
    """A `pipeline.Progress`: one line per stage, drawn on stderr when that is a terminal, silent otherwise."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            for task in self._tasks.values():
                self._progress.stop_task(task)
            self._tasks[stage] = self._progress.add_task(safe(stage), total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)


@contextmanager
def progress() -> Iterator[Bars]:
    """Bars for the length of a verb."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        yield Bars(bars)


def size(count: float) -> str:
    """Bytes as people read them: 13.60 MB, 1.24 GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def printable(text: object) -> str:
    """One line without control characters, escape codes or direction overrides: names come from untrusted files."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(str(text).split()))


def safe(text: object) -> str:
    """`printable`, and no markup to rich either."""
    return escape(printable(text))


def line(out: Console, text: object, *, dim: bool = False) -> None:
    """One line of plain text, however long, so that commands and paths in it can be copied."""
    out.print(printable(text), style="dim" if dim else None, markup=False, highlight=False, soft_wrap=True)


def table(*columns: str, title: str = "", head: bool = True) -> Table:
    """Columns whose names start with ">" hold numbers and are right-aligned. head: show the names."""
    made = Table(
        title=safe(title) if title else None,
        box=box.SIMPLE_HEAD if head else None,
        show_header=head,
        title_justify="left",
        pad_edge=False,
    )
    for column in columns:
        number = column.startswith(">")
        made.add_column(safe(column[1:] if number else column), justify="right" if number else "left", overflow="fold")
    return made


_PRODUCTS = {"int8": "int8, on weights unpacked when the session is created", "packed": "on packed weights"}
_MOST_NOTES = 12
"""More notes than this are cut in the middle; `edgec inspect` prints them all."""


def print_export(out: Console, done: Any, cost: Mapping[str, float]) -> None:
    manifest = done.manifest
    sizes, parity = manifest["sizes"], manifest["parity"]
    shown = table("", "", title=str(done.out), head=False)
    shown.add_row("model file", f"{size(sizes['model_bytes'])}, {sizes['total_bpw']:.2f} bits per weight")
    ratio = sizes["model_bytes"] / sizes["dense_fp16_bytes"]
    shown.add_row("of dense fp16", f"{ratio:.3f}  ({size(sizes['dense_fp16_bytes'])})")
    shown.add_row("block linears", f"{sizes['linear_bpw']:.2f} bits per weight: {_mix(done.plan)}")
    if "arithmetic" in manifest:
        shown.add_row("products", _PRODUCTS[manifest["arithmetic"]])
    shown.add_row("parity with torch", f"{parity['error']:.1e}  (with int8 activations {parity['shipped']:.1e})")
    for name, value in _quality_rows(manifest["quality"]):
        shown.add_row(name, safe(value))
    shown.add_row("took", f"{cost['seconds']:.0f} s, peak memory {size(cost['peak_rss_bytes'])}")
    out.print(shown)
    notes = done.plan.notes
    for note in notes if len(notes) <= _MOST_NOTES else (*notes[: _MOST_NOTES - 2], "…", notes[-1]):
        line(out, f"note: {note}", dim=True)
    line(out, f"next: edgec run {done.out} …   ·   edgec inspect {done.out}")


def _mix(plan: Any) -> str:
    counts: dict[str, int] = {}
    for choice in plan.choices:
        if choice.role == "linear":
            key = f"{choice.spec.kind} {choice.format.partition('-')[0]}"
            counts[key] = counts.get(key, 0) + 1
    return ", ".join(f"{count}× {key}" for key, count in sorted(counts.items(), key=lambda item: -item[1]))


def _quality_rows(quality: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "cosine" in quality:
        yield "cosine to dense", f"{quality['cosine']:.4f}  (worst 5 %: below {quality['low']:.4f})"
    if "kl" in quality:
        yield "KL from dense", f"{quality['kl']:.4f} nats per token [{quality['low']:.4f}, {quality['high']:.4f}]"
        yield "perplexity", f"{quality['perplexity']:.2f}  (dense {quality['dense_perplexity']:.2f})"
        yield "same top token", f"{100 * quality['top1']:.1f} %"
    if "text" in quality:
        yield "measured on", str(quality["text"])


def print_profile(out: Console, found: Any, folder: Path | None, plot: Path | None) -> None:
    shown = table(
        "layer", ">shape", ">S [nats]", ">of random", ">χ ≈ exp S", "", title="entanglement entropy per layer"
    )
    for layer in found.layers:
        for cut, entropy in layer.entropy.items():
            share = entropy / layer.random[cut] if layer.random[cut] else 0.0
            name = layer.name if cut == "svd" else f"  cut {cut}"
            bar = "█" * round(16 * min(1.0, share))
            note = " random" if cut == "svd" and layer.incompressible else ""
            shape = f"{layer.shape[0]}x{layer.shape[1]}" if cut == "svd" else ""
            shown.add_row(safe(name), shape, f"{entropy:.2f}", f"{share:.3f}", f"{np.exp(entropy):.0f}", bar + note)
    out.print(shown)
    line(out, f"{found.tokens} tokens of {found.calibration}; checkpoint {found.fingerprint[:19]}…")
    for path in (folder, plot):
        if path is not None:
            line(out, f"wrote {path}")


def profile_summary(found: Any) -> dict[str, Any]:
    """What `profile --json` prints: everything but arrays and candidates."""
    layers = [
        {
            "name": layer.name,
            "role": layer.role,
            "shape": list(layer.shape),
            "entropy": dict(layer.entropy),
            "random_entropy": dict(layer.random),
            "incompressible": layer.incompressible,
            "candidates": len(layer.candidates),
        }
        for layer in found.layers
    ]
    return {
        "fingerprint": found.fingerprint,
        "calibration": found.calibration,
        "tokens": found.tokens,
        "layers": layers,
    }


def plot_entropies(found: Any, path: Path) -> None:
    """Entropy of every layer at its svd cut against a random matrix's, in module order."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from edgec.outputs import written_file

    layers = [layer for layer in found.layers if layer.role != "embedding"]
    figure, axes = pyplot.subplots(figsize=(10, max(3.0, 0.16 * len(layers))), layout="constrained")
    rows = np.arange(len(layers))
    axes.barh(rows, [layer.entropy["svd"] for layer in layers], color="#3b6ea5", label="this model")
    axes.plot(
        [layer.random["svd"] for layer in layers], rows, "|", color="#b04a3a", label="random matrix of this shape"
    )
    axes.set_yticks(rows, [layer.name[-48:] for layer in layers], fontsize=6, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("von Neumann entropy across the output|input cut [nats]")
    axes.legend(loc="lower right", fontsize=7)
    with written_file(path) as temporary:
        figure.savefig(
            temporary,
            format=path.suffix.lstrip(".") or "svg",
            metadata={"Date": None} if path.suffix == ".svg" else None,
        )
    pyplot.close(figure)


def print_pairs(out: Console, title: str, values: Mapping[str, Any]) -> None:
    shown = table("", "", title=title, head=False)
    for name, value in values.items():
        shown.add_row(safe(name.replace("_", " ")), f"{value:.5g}" if isinstance(value, float) else safe(value))
    out.print(shown)


def print_similarities(out: Console, texts: Sequence[str], vectors: Any) -> None:
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    shown = table("cosine similarity", *(f">{i + 1}" for i in range(len(texts))))
    for i, text in enumerate(texts):
        shown.add_row(safe(f"{i + 1}  {text[:60]}"), *(f"{value:.3f}" for value in unit[i] @ unit.T))
    out.print(shown)


def print_bench(
    out: Console, rows: Sequence[Measurement], costs: Sequence[Any], machine: Mapping[str, str], *, as_json: bool
) -> None:
    """machine: what the device said of itself."""
    from edgec.report import measurement_table, to_json

    if as_json:
        body = json.loads(to_json(rows, machine=machine, commands=[_command()]))
        body["exports"] = [vars(cost) for cost in costs]
        sys.stdout.write(json.dumps(body) + "\n")
        return
    out.print(measurement_table(rows))
    for cost in costs:
        line(out, f"export of {cost.name}: {cost.seconds:.0f} s, peak memory {size(cost.peak_rss_bytes)}")
    if len(rows) == 2 and all(row.metrics for row in rows):
        print_ratios(out, rows[0], rows[1])


def print_ratios(out: Console, subject: Measurement, reference: Measurement) -> None:
    """Speed and memory of the first against the second, from the medians of one run."""
    shown = table(f"{subject.contestant} ÷ {reference.contestant}", ">ratio of medians")
    for key in subject.metrics:
        if key in reference.metrics and reference.metrics[key].value > 0:
            shown.add_row(key, f"{subject.metrics[key].value / reference.metrics[key].value:.2f}")
    out.print(shown)


def _command() -> str:
    """As it was typed, quoted so that it can be typed again."""
    return shlex.join(["edgec", *sys.argv[1:]])


class BenchFiles:
    """What a bench writes beside what it prints. A frontier.json and a profile that its report shows are read at once:
    a broken one must not be found after the measuring.
    """

    def __init__(
        self,
        report: Path | None = None,
        markdown: Path | None = None,
        csv: Path | None = None,
        *,
        frontier: Path | None = None,
        profile: Path | None = None,
        artifact: Path | None = None,
    ) -> None:
        """artifact: whose plan the report shows. Raises UsageError, CheckpointError, ProfileError."""
        from edgec.inspection import healing_curve_of, plan_of
        from edgec.profile.store import load_profile
        from edgec.report import read_frontier

        self.report, self.markdown, self.csv = report, markdown, csv
        if report is None and (frontier or profile):
            raise UsageError("--frontier and --profile are drawn into a --report; name one")
        made = artifact if report and artifact and (artifact / MANIFEST_NAME).is_file() else None
        self.plan = plan_of(made) if made else None
        self.healing = healing_curve_of(made) if made else ()
        self.frontier = read_frontier(frontier) if frontier else None
        found = load_profile(profile) if profile else None
        if found is not None and self.plan is not None and found.fingerprint != self.plan.fingerprint:
            raise UsageError(f"--profile {profile}: of another model than {artifact} was made from")
        self.entropies = {layer.name: layer.entropy["svd"] for layer in found.layers} if found else None


def write_bench_files(
    rows: Sequence[Measurement], artifacts: Sequence[Path], files: BenchFiles, machine: Mapping[str, str]
) -> list[Path]:
    """Each whole or not at all; returns what was written. Raises OutputError."""
    from edgec.outputs import written_file
    from edgec.report import to_csv, to_markdown

    written = []
    for path, render in ((files.markdown, to_markdown), (files.csv, to_csv)):
        if path is not None:
            with written_file(path) as temporary:
                temporary.write_text(render(rows), encoding="utf-8")
            written.append(path)
    if files.report is not None:
        _write_bench_report(files.report, rows, artifacts, files, machine)
        written.append(files.report)
    return written


def _write_bench_report(
    path: Path,
    rows: Sequence[Measurement],
    artifacts: Sequence[Path],
    files: BenchFiles,
    machine: Mapping[str, str],
) -> None:
    """One HTML file from a bench and from the first artifact's manifest."""
    from edgec.report import write_report

    reference = next((row.contestant for row in rows if "fp32" in row.contestant), None)
    write_report(
        path,
        title=f"edgec: {artifacts[0].name}" if artifacts else "edgec bench",
        measurements=rows,
        plan=files.plan,
        profile_entropies=files.entropies,
        machine=machine,
        commands=[_command()],
        subject=rows[0].contestant,
        reference=reference,
        healing=files.healing,
        frontier=files.frontier,
    )


def machine(device: Device) -> dict[str, str]:
    """What a reader needs to judge a timing that was taken there. Raises BenchError where nothing answers."""
    described = {name: str(told) for name, told in device.describe().items()}
    return {**described, "edgec's python": platform.python_version()}


def print_frontier(out: Console, found: Any, folder: Path) -> None:
    from edgec.report.frontier_tables import terminal_tables

    for shown in terminal_tables(found):
        out.print(shown)
    line(out, f"wrote {folder}: frontier.md, frontier.svg, frontier.html, frontier.json")


def print_inspection(out: Console, found: Any) -> None:
    from edgec.report import plan_table

    print_pairs(out, found.title, found.headline)
    if found.plan is not None:
        out.print(plan_table(found.plan))
    for text in found.lines:
        line(out, text, dim=True)


def print_targets(out: Console, chosen: Sequence[Target], *, full: bool) -> None:
    if not full:
        shown = table("target", "runs on", "default budget")
        for target in chosen:
            shown.add_row(target.name, target.description, target.default_budget)
        out.print(shown)
        return
    for target in chosen:
        print_pairs(out, target.name, {k: ", ".join(v) if isinstance(v, tuple) else v for k, v in vars(target).items()})


def print_findings(out: Console, findings: Sequence[Any]) -> None:
    shown = table("check", "", "detail")
    for finding in findings:
        state = "[green]ok[/]" if finding.ok else "[red]fails[/]"
        shown.add_row(finding.check, "[dim]absent[/]" if finding.optional else state, safe(finding.detail))
    out.print(shown)
