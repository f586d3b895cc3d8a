"""A searched plan's factors, fitted once more block by block.

A search tries dozens of plans and so takes every layer's factors from one set of statistics, those of the dense model.
The plan that it ends with is worth the minute of `compress.streaming`: every layer is fitted on what the compressed
layers before it produce, to what the dense model has there. On all-MiniLM-L6-v2 that halves 1 − cosine at 4 bits and
at 2, on a small Llama it takes a quarter off the divergence at 4 bits and a third at 2. Searching with factors made so
was turned down: a plan takes a minute instead of seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgec.compress.streaming import fit_by_rows
from edgec.errors import NumericsError, UnsupportedModelError
from edgec.fit import Factors
from edgec.moments import SecondMoment
from edgec.pipeline.stages import Progress, fit, fit_by_blocks, lossless
from edgec.profile.store import load_profile
from edgec.records import Choice, Plan
from edgec.workspace import Workspace

logger = logging.getLogger(__name__)


def refitted(
    workspace: Workspace, choices: Sequence[Choice], factors: Mapping[str, Factors], progress: Progress
) -> tuple[Mapping[str, Factors], str]:
    """The better of `factors` and those that a fit block by block gives, by the divergence on the search text; and a
    sentence for the plan, "" where nothing was tried. Tables stay as they are: their curvature takes the whole model.
    """
    if lossless(choices):
        return factors, ""

    def fit_tables_once(choice: Choice, weight: NDArray[Any], moment: SecondMoment | None) -> Factors:
        return factors[choice.layer] if choice.role == "embedding" else fit_by_rows(choice, weight, moment)

    def told(done: int, total: int) -> None:
        progress("fitting block by block", done, total)

    try:
        again = fit_by_blocks(workspace, choices, workspace.calibration_batches, told, fit_tables_once)
    except (UnsupportedModelError, NumericsError) as error:  # blocks that share weights; a stream that overflows
        logger.info("%s: not refitted block by block (%s)", workspace.folder, error)
        return factors, ""
    before, after = (workspace.loss_with(tried, workspace.divergence_on_search) for tried in (factors, again))
    change = f"divergence {before:.3g} → {after:.3g}"
    if not after < before:
        return factors, f"fitting block by block did not help and is discarded ({change})"
    return again, f"fitted block by block: {change}"


def fit_from_profile(
    workspace: Workspace, made: Plan, folder: Path, progress: Progress
) -> tuple[Mapping[str, Factors], str]:
    """What `refitted` makes of a given plan's factors that come from a profile folder's statistics."""
    found = load_profile(folder, workspace.checkpoint)
    return refitted(workspace, made.choices, fit(workspace, made.choices, found, progress), progress)
