"""A checkpoint's weights by the names that the model's modules have."""

from __future__ import annotations

from typing import Any

import transformers
from numpy.typing import NDArray

from edgec import modeling
from edgec.checkpoint import Checkpoint
from edgec.errors import CheckpointError


class StoredWeights:
    """Layer name → its dense weight [out, in] (table [v, d]) as stored, memory-mapped; a tied head's from its table."""

    def __init__(self, checkpoint: Checkpoint, model: transformers.PreTrainedModel) -> None:
        self._checkpoint = checkpoint
        self._tied = {layer.name: layer.tied_to for layer in modeling.layers(model) if layer.tied_to}
        self._names = {place: name for name, place in modeling.places(model, checkpoint).items()}

    def __call__(self, layer: str) -> NDArray[Any]:
        place = f"{layer}.weight"
        if place not in self._names and layer in self._tied:
            place = f"{self._tied[layer]}.weight"
        return self.tensor(place)

    def tensor(self, place: str) -> NDArray[Any]:
        """Any tensor by the model's own name for it. Raises CheckpointError where it is missing."""
        try:
            return self._checkpoint.read(self._names[place])
        except KeyError as error:
            raise CheckpointError(f"{self._checkpoint.folder}: tensor {place!r} is missing") from error
