"""Budgets as people type them: `12MB`, `0.3`, `4bpw`, `4bpw-linear`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from edgec.errors import UsageError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", re.IGNORECASE)
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s)", re.IGNORECASE)
_BPW = re.compile(r"(\d+(?:\.\d+)?)bpw(-linear)?", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """kind: "size" [bytes of the whole output folder], "ratio" [of the dense fp16 weights], "total" [bits per
    distinct parameter, model file and external data], "linear" [bits per parameter of the block linears;
    everything else at int8].
    """

    kind: str
    value: float
    text: str

    def __str__(self) -> str:
        return self.text

    def model_bytes(self, parameters: int, runtime_files: int = 0) -> float:
        """Bytes that model file and external data may take; infinite for a linear budget, which caps linears only.

        parameters: distinct ones of the checkpoint. runtime_files: bytes of tokenizer and configuration beside
        the model.
        """
        match self.kind:
            case "size":
                return self.value - runtime_files
            case "ratio":
                return self.value * 2 * parameters
            case "total":
                return self.value * parameters / 8
            case _:
                return math.inf

    def raised_to(self, model_bytes: float, parameters: int, runtime_files: int = 0) -> str:
        """The smallest budget of this kind, rounded up, that leaves so many bytes to the model: "0.24", "3.9bpw".

        parameters: as in `model_bytes`; of the block linears for a linear budget.
        """
        match self.kind:
            case "size":
                size = math.ceil((model_bytes + runtime_files) / 1e4) / 100
                return f"{size:.2f}MB"
            case "ratio":
                return f"{math.ceil(1e3 * model_bytes / (2 * parameters)) / 1e3:.3f}"
            case kind:
                bits = math.ceil(100 * 8 * model_bytes / parameters) / 100
                return f"{bits:.2f}bpw" + ("-linear" if kind == "linear" else "")

    def linear_bytes(self, linear_parameters: int) -> float:
        """Bytes that the block linears may take; infinite unless the budget is linear."""
        return self.value * linear_parameters / 8 if self.kind == "linear" else math.inf


def parse_budget(text: str) -> Budget:
    """Raises UsageError saying what a budget may be."""
    stripped = text.strip()
    if match := _BPW.fullmatch(stripped):
        budget = Budget("linear" if match[2] else "total", float(match[1]), stripped)
    elif match := _SIZE.fullmatch(stripped):
        budget = Budget("size", float(match[1]) * _UNITS[match[2].upper()], stripped)
    else:
        try:
            budget = Budget("ratio", float(stripped), stripped)
        except ValueError:
            budget = Budget("ratio", math.nan, stripped)
    meaningless = budget.kind == "ratio" and budget.value > 2  # more than fp32: "12" for "12MB"
    if meaningless or not (math.isfinite(budget.value) and budget.value > 0):
        raise UsageError(
            f"budget {text!r}: expected a size (12MB), a ratio of the dense fp16 weights (0.3), or bits per weight "
            "(4bpw, 4bpw-linear)"
        )
    return budget


def parse_time(text: str, option: str) -> float:
    """Milliseconds of "30ms" or "0.5s". option: what it was typed after. Raises UsageError."""
    match = _TIME.fullmatch(text.strip())
    value = float(match[1]) * (1e3 if match[2].lower() == "s" else 1.0) if match else 0.0
    if not value > 0:
        raise UsageError(f"{option} {text!r}: expected a time, for example 30ms or 0.5s")
    return value
