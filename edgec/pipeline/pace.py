"""Milliseconds as a second objective: a runtime's kernels timed on this machine, before a plan is made."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

from edgec.bench import microbench, microbench_ggml
from edgec.errors import UsageError
from edgec.modeling import DECODER_TASK
from edgec.pipeline.stages import Goal, Progress
from edgec.plan import hardware
from edgec.plan.latency import DECODE_ROWS, PREFILL_ROWS, Pace, fit_costs
from edgec.records import Target
from edgec.runtime.options import physical_cores

logger = logging.getLogger(__name__)

_UNSTEADY = 0.4
"""Misfit of a cost model beyond which times are more noise than price; an idle machine has 0.1 to 0.2."""


def paced(goal: Goal, target: Target, task: str, progress: Progress) -> Goal:
    """The goal with the price of every form in milliseconds, where it has a cap on them; else as it is.

    The planned layers of one token (causal LMs) or of a sentence of 128 tokens (encoders) are what is capped, at as
    many threads as the runtime takes by default; attention, norms and the runtime's own overhead come on top. A GGUF
    file is planned for a machine like this one, whatever it is. Raises UsageError where this machine cannot tell the
    target's times.
    """
    if goal.max_ms is None or goal.pace is not None:
        return goal
    told = partial(progress, "timing kernels")
    if target.gguf:
        formats = tuple(dict.fromkeys((*target.dense_formats, *target.factored_formats)))
        samples = microbench_ggml.measure(formats, threads=physical_cores(), progress=told)
    else:
        if not hardware.runs_here(hardware.of_target(target)):
            here = hardware.detect().hardware.machine
            raise UsageError(
                f"--max-latency times the runtime's kernels on this machine ({here}), which does not run "
                f"{target.name}; leave it out, or plan on a machine of the target's kind"
            )
        samples = microbench.measure(
            threads=physical_cores(),
            accuracy_level=target.accuracy_level,
            unpacked=target.multiplies_in_int8(encoder=task != DECODER_TASK),
            progress=told,
        )
    costs = fit_costs(samples)
    if costs.misfit > _UNSTEADY:
        logger.warning(
            "kernel times miss their own cost model by %.0f %%: something else runs on this machine", 100 * costs.misfit
        )
    rows = DECODE_ROWS if task == DECODER_TASK else PREFILL_ROWS
    return replace(goal, pace=Pace(lambda choice: costs.choice(choice, rows), cap=goal.max_ms))
