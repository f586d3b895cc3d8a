"""Prints the quality figures that README and issues quote: `python -m runtime_tests.figures [NAME …]`.

minilm: all-MiniLM-L6-v2, calibrated on STS-Benchmark train sentences, reported on its dev split, embeddings at int8, no
healing. minilm-total: its tables compressed too, healed. pycode-lm: calibrated on calib.txt, reported on valid.txt. All
against the best uniform plans at the same budget, which the planner measures on text of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edgec import assess, pipeline
from edgec.heal.settings import HealSettings, parse_heal
from runtime_tests.models import ASSETS, minilm_folder, sts_train_text

BUDGETS = ("5bpw-linear", "4bpw-linear", "3bpw-linear")
TOTAL_BUDGETS = ("4bpw", "3bpw")


def minilm(work: Path, table: Table) -> None:
    """STS-B dev Spearman at each budget on linears, with its paired-bootstrap interval."""
    _minilm(work, table, BUDGETS, HealSettings())


def minilm_total(work: Path, table: Table) -> None:
    """The same at budgets on everything, tables included, healed."""
    _minilm(work, table, TOTAL_BUDGETS, parse_heal("300steps"))


def _minilm(work: Path, table: Table, budgets: Sequence[str], heal: HealSettings) -> None:
    model = minilm_folder()
    text = sts_train_text(work)
    if not (work / "profile-minilm").exists():
        pipeline.profile(model, work / "profile-minilm", calibration=text)
    for budget in budgets:
        done = _export(model, work, budget, text, "minilm", heal)
        found = assess.evaluate(done.out, model, sts=ASSETS / "stsb" / "sts-dev.csv")
        value = (
            f"Spearman {found['spearman']:.4f} (dense {found['spearman_dense']:.4f}), loss "
            f"{found['spearman_loss']:+.4f} [{found['spearman_loss_low']:+.4f}, {found['spearman_loss_high']:+.4f}]"
        )
        sizes = done.manifest["sizes"]
        bits = f"{sizes['linear_bpw']:.3f}, {sizes['total_bpw']:.3f}"
        table.add_row(f"all-MiniLM-L6-v2 {budget}", bits, value, done.plan.notes[-1])


def pycode_lm(work: Path, table: Table) -> None:
    """KL and perplexity on valid.txt at each budget."""
    model = ASSETS / "pycode-lm"
    pipeline.profile(model, work / "profile-pycode", calibration=model / "calib.txt")
    for budget in BUDGETS:
        done = _export(model, work, budget, model / "calib.txt", "pycode", HealSettings())
        found = assess.evaluate(done.out, model, calibration=model / "valid.txt")
        value = (
            f"KL {found['kl']:.4f} [{found['low']:.4f}, {found['high']:.4f}], perplexity {found['perplexity']:.2f} "
            f"(dense {found['dense_perplexity']:.2f}), top-1 {found['top1']:.3f}"
        )
        sizes = done.manifest["sizes"]
        bits = f"{sizes['linear_bpw']:.3f}, {sizes['total_bpw']:.3f}"
        table.add_row(f"pycode-lm {budget}", bits, value, done.plan.notes[-1])


def _export(model: Path, work: Path, budget: str, text: Path, name: str, heal: HealSettings) -> pipeline.Exported:
    out, profile = work / f"{name}-{budget}", work / f"profile-{name}"
    request = pipeline.ExportRequest(
        model, "onnx-x64", out, budget=budget, calibration=text, profile=profile, heal=heal
    )
    return pipeline.export(request)


def main() -> None:
    """Run the named figures (all of them by default) and print one table."""
    figures = {"minilm": minilm, "minilm-total": minilm_total, "pycode-lm": pycode_lm}
    parser = argparse.ArgumentParser(prog="python -m runtime_tests.figures", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *figures], help="figures to print; default: all")
    chosen = parser.parse_args().names or list(figures)
    columns = ("model, budget", "linear, total bpw", "held-out quality of the exported folder", "plan by measured loss")
    table = Table(*columns)
    with tempfile.TemporaryDirectory(prefix="edgec-figures-") as work:
        for name in chosen:
            figures[name](Path(work), table)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
