"""What devices that are a GPU of this machine share."""

from __future__ import annotations

import re
from collections.abc import Mapping

from edgec.errors import UsageError
from edgec.runtime.options import MAX_GPU

NOTES = ("peak RAM is the process's; what lies in the GPU's own memory is not in it",)


def number(kind: str, argument: str) -> int:
    """"" or "1" → the GPU's number. Raises UsageError."""
    if not re.fullmatch(r"\d{0,2}", argument) or int(argument or 0) > MAX_GPU:
        raise UsageError(f"device '{kind}:{argument}': expected {kind}, or {kind}:N for GPU number N of this machine")
    return int(argument or 0)


def host(told: Mapping[str, str]) -> dict[str, str]:
    """What a GPU's description says of the machine around it. told: by `LocalDevice.describe`."""
    return {"host": f"{told['processor']}, {told['cores']}, {told['memory']}", "python": told["python"]}
