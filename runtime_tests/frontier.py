"""The frontier's figures, one run each: `python -m runtime_tests.frontier [minilm] [pycode-lm] [stories]
[headlines]`.

minilm: all-MiniLM-L6-v2, calibrated on STS-Benchmark train sentences, Spearman on its dev split. pycode-lm:
calibrated (and healed) on calib.txt and heal.txt, KL and perplexity on valid.txt. stories: stories260K, calibrated on
four fifths of the stories of the TinyStories sample and measured on the others. headlines: what the sources claim
(`runtime_tests/headlines.py`).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from edgec import frontier
from edgec.console import progress
from edgec.frontier import FrontierRequest
from edgec.heal.settings import parse_heal
from edgec.peers import chosen
from edgec.plan.refine import parse_search
from edgec.report.frontier_tables import terminal_tables
from runtime_tests import headlines
from runtime_tests.models import ASSETS, minilm_folder, stories_folder, sts_train_text

_END_OF_STORY = "<|endoftext|>"


def minilm(work: Path) -> FrontierRequest:
    return FrontierRequest(minilm_folder(), calibration=sts_train_text(work), sts=ASSETS / "stsb" / "sts-dev.csv")


def pycode_lm(work: Path) -> FrontierRequest:
    model = ASSETS / "pycode-lm"
    text = work / "pycode.txt"
    parts = [(model / name).read_text(encoding="utf-8") for name in ("calib.txt", "heal.txt")]
    text.write_text("\n\n".join(parts), encoding="utf-8")
    return FrontierRequest(model, calibration=text, eval_text=model / "valid.txt")


def stories(work: Path) -> FrontierRequest:
    """Every fifth story to report on. Not by their hash: edgec splits the rest by it again."""
    sample = (ASSETS / "tinystories" / "tinystories_sample_2M.txt").read_text(encoding="utf-8")
    whole = [" ".join(story.split()) for story in sample.split(_END_OF_STORY) if story.strip()]
    (work / "report.txt").write_text("\n\n".join(whole[::5]), encoding="utf-8")
    (work / "calib.txt").write_text("\n\n".join(s for i, s in enumerate(whole) if i % 5), encoding="utf-8")
    return FrontierRequest(stories_folder(), calibration=work / "calib.txt", eval_text=work / "report.txt")


def main() -> None:
    """Run the named figures (all of them by default), print their tables, and keep the folders where -o says."""
    figures: dict[str, Callable[[Path], FrontierRequest]] = {
        "minilm": minilm,
        "pycode-lm": pycode_lm,
        "stories": stories,
    }
    parser = argparse.ArgumentParser(prog="python -m runtime_tests.frontier", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *figures, "headlines"], help="default: all")
    parser.add_argument("--bits", default="5,4,3,2.5,2")
    parser.add_argument("--peers", default="all")
    parser.add_argument("--heal", default="off", help="plans and the best rivals alike, for this long each: 2min")
    parser.add_argument("--search", default="greedy")
    parser.add_argument("-o", "--out", type=Path, help="keep frontier folders here")
    given = parser.parse_args()
    console = Console(width=150)
    with tempfile.TemporaryDirectory(prefix="edgec-frontier-") as temporary:
        for name in given.names or [*figures, "headlines"]:
            if name == "headlines":
                text = pycode_lm(Path(temporary)).calibration
                assert text is not None
                console.print(headlines.table(text, parse_heal(given.heal)))
                continue
            work = Path(temporary)
            request = replace(
                figures[name](work),
                bits=frontier.parse_bits(given.bits),
                peers=chosen(given.peers),
                heal=parse_heal(given.heal),
                search=parse_search(given.search),
            )
            with progress() as bars:
                found = frontier.run_and_write(request, (given.out or work) / f"frontier-{name}", bars, force=True)
            for table in terminal_tables(found):
                console.print(table)


if __name__ == "__main__":
    main()
