"""The only place that orders the stages: checkpoint → profile → plan → compress → heal → export → verify.

Each function is one verb of the command line; `export` runs them all. Stages hand records to one another, and where one
needs a judgement from further on (a plan wants its end-to-end loss) it gets a callback from here.
"""

from edgec.errors import EdgecError
from edgec.pipeline.exporting import Exported, export
from edgec.pipeline.refit import refitted
from edgec.pipeline.request import ExportRequest
from edgec.pipeline.stages import (
    Goal,
    Progress,
    evaluator,
    explicit_plan,
    fit,
    fit_drafts,
    make_profile,
    profile_of,
    search_plan,
)
from edgec.pipeline.verbs import compress, plan, profile
from edgec.pipeline.verified import measure_quality

__all__ = [
    "EdgecError",
    "ExportRequest",
    "Exported",
    "Goal",
    "Progress",
    "compress",
    "evaluator",
    "explicit_plan",
    "export",
    "fit",
    "fit_drafts",
    "make_profile",
    "measure_quality",
    "plan",
    "profile",
    "profile_of",
    "refitted",
    "search_plan",
]
