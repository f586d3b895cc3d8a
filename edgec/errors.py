"""Every error that edgec raises on purpose.

One tree, so that the command line can turn any of them into one clear line and an exit code, and a
library user can catch exactly what they can handle. A message says what was expected, what came, and
what to do next; it names the file, layer, tensor or limit.
"""

from __future__ import annotations


class EdgecError(Exception):
    """Base of all errors that edgec raises on purpose. `exit_code` is what the command exits with."""

    exit_code = 1


class UsageError(EdgecError):
    """The request itself cannot be meant: an option's value, a combination, a missing argument."""

    exit_code = 2


class CheckpointError(EdgecError):
    """The checkpoint folder is missing, malformed, hostile, or holds numbers that cannot be used."""


class UnsupportedModelError(EdgecError):
    """The architecture, or one of its dimensions, is beyond what edgec or the target's runtime can execute."""


class RecipeError(EdgecError):
    """A recipe, plan or other hand-edited YAML file is malformed or names something unknown."""


class PlanError(EdgecError):
    """A plan does not fit the model: unknown layer, rank above its cut's maximum, format unknown to the target."""


class BudgetError(PlanError):
    """The budget is below the floor of what can be shipped."""


class ProfileError(EdgecError):
    """A profile is stale (another checkpoint's) or unreadable."""


class CalibrationError(EdgecError):
    """The calibration text is missing, unreadable or too short."""


class NumericsError(EdgecError):
    """NaN, Inf, or a decomposition that did not converge; names the layer."""


class ExportError(EdgecError):
    """A stage of the export failed; the message names the stage."""


class VerificationError(ExportError):
    """The exported model does not agree with the compressed one, or a file does not match its manifest."""


class OutputError(EdgecError):
    """The output cannot be written: it exists, the disk is full, it is not a folder."""


class RuntimeUnavailableError(EdgecError):
    """A runtime that the request needs is not installed; the message says how to install it."""


class BenchError(EdgecError):
    """A measurement failed: the worker crashed, timed out or answered nonsense."""
