"""Whole exported folders (`model.onnx`, `model.onnx.data`, a config) on arm64 against x86-64.

Token ids are random: parity needs no meaning, and random ids reach more rows of the embedding. A quantised folder
runs twice, in the kernels that a device picks by itself and in the portable ones, which must round as x86-64 does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from runtime_tests.arm64.compare import Agreement, compare_with_x86
from runtime_tests.arm64.root import DEFAULT_CPU, Arm64Root
from runtime_tests.arm64.variants import PORTABLE_KERNELS
from runtime_tests.model_inputs import decoder_inputs, encoder_inputs, vocabulary_size

_TOKENS = 24


def check_encoder(root: Arm64Root, artifact: Path, *, cpu: str = DEFAULT_CPU) -> list[Agreement]:
    """Run a padded batch of two; raises `AssertionError` when the machines disagree."""
    return _checked(compare_encoder(root, artifact, cpu=cpu))


def check_decoder(root: Arm64Root, artifact: Path, *, cpu: str = DEFAULT_CPU) -> list[Agreement]:
    """Run a prefill from an empty cache, then one decode step on x86-64's cache; raises when the machines disagree."""
    return _checked(compare_decoder(root, artifact, cpu=cpu))


def compare_encoder(root: Arm64Root, artifact: Path, *, cpu: str = DEFAULT_CPU) -> list[Agreement]:
    """`check_encoder` without its verdict."""
    model = artifact / "model.onnx"
    ids = np.random.default_rng(0).integers(0, vocabulary_size(artifact), (2, _TOKENS))
    inputs = encoder_inputs(model, ids, np.array([_TOKENS, _TOKENS // 2]))
    return _compare(root, model, inputs, cpu)


def compare_decoder(root: Arm64Root, artifact: Path, *, cpu: str = DEFAULT_CPU) -> list[Agreement]:
    """`check_decoder` without its verdict."""
    model = artifact / "model.onnx"
    ids = np.random.default_rng(0).integers(0, vocabulary_size(artifact), (1, _TOKENS + 1))
    prefill = _compare(root, model, decoder_inputs(model, ids[:, :-1]), cpu)
    step = _compare(root, model, decoder_inputs(model, ids[:, -1:], prefill[0].x86), cpu)
    return prefill + step


def _compare(root: Arm64Root, model: Path, inputs: Mapping[str, np.ndarray], cpu: str) -> list[Agreement]:
    """One agreement for a floating-point model, two (device's choice, portable kernels) for a quantised one."""
    agreements = [compare_with_x86(root, model, inputs, cpu=cpu)]
    if agreements[0].packed:
        agreements.append(compare_with_x86(root, model, inputs, cpu=cpu, config=PORTABLE_KERNELS))
    return agreements


def _checked(agreements: list[Agreement]) -> list[Agreement]:
    assert agreements
    for agreement in agreements:
        agreement.check()
    return agreements
