"""Kinds of artifact that a target may name, one per file: what the pipeline drives without knowing which it is.

A kind is a plugin (`PLUGIN = True`) that defines the functions of `ArtifactKind` at module level. A class hierarchy was
turned down: the kinds share the order of the stages, which is the pipeline's, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import transformers

from edgec import plugins
from edgec.calibration import Batches
from edgec.checkpoint import Checkpoint
from edgec.export.verify import Parity
from edgec.fit import Factors
from edgec.records import Target

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Written:
    """What an export put into its folder: model_bytes of the model files, tensor → stored bytes.

    types: tensor → the type that it is stored in, where the kind has types of its own. notes: for the manifest.
    """

    model_bytes: int
    tensors: Mapping[str, int]
    types: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class ArtifactKind(Protocol):
    """What a file here defines."""

    RECONSTRUCTS: bool
    """Are factored layers written as the dense matrices that they stand for?"""

    PACKAGES: tuple[str, ...]
    """Installed packages whose versions the manifest records."""

    def refuse_unsupported(self, checkpoint: Checkpoint, task: str) -> None:
        """Raises UnsupportedModelError or RuntimeUnavailableError, before any work."""
        ...

    def prepare(self, checkpoint: Checkpoint, task: str, work: Path) -> Any:
        """The draft that the other functions take: of `checkpoint`, before any layer is replaced. work: an existing
        folder for temporary files.
        """
        ...

    def other_bytes(self, draft: Any, planned: Set[str]) -> int:
        """Bytes of the model files beside the planned layers; may be an estimate."""
        ...

    def write(
        self, draft: Any, factors: Mapping[str, Factors], target: Target, out: Path, progress: Progress
    ) -> Written:
        """The model files, into the existing folder `out`. The draft is used up."""
        ...

    def write_companions(self, checkpoint: Checkpoint, draft: Any, out: Path) -> int:
        """What the runtime needs beside the model files. Returns its bytes."""
        ...

    def parity(
        self, folder: Path, reference: transformers.PreTrainedModel, task: str, batches: Batches, work: Path
    ) -> Parity:
        """The written folder against the compressed torch model. Raises VerificationError."""
        ...


def kind_of(target: Target) -> ArtifactKind:
    """The kind that a target names. Raises UsageError for one that does not exist."""
    return cast(ArtifactKind, plugins.load(__name__, target.artifact))
