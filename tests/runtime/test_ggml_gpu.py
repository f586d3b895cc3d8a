"""GGUF files on a GPU, where ggml has one: the processor's logits, and its alone where none is asked for.

Any back end will do. A software driver is enough: llama-cpp-python built with GGML_VULKAN, Mesa's lavapipe (25 does;
22.3 crashes when memory is given back) and GGML_VK_VISIBLE_DEVICES=0, because ggml passes processors over unless asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("llama_cpp")

import llama_cpp
from ggml_for_tests import evaluate_on_ggml

from edgec import decompose, random_gguf
from edgec.bench import shapes
from edgec.contraction import core_shapes, evaluate
from edgec.fit import contraction_of
from edgec.records import Spec
from edgec.runtime import RuntimeOptions, open_artifact

pytestmark = pytest.mark.skipif(
    not llama_cpp.llama_supports_gpu_offload(), reason="this llama-cpp-python has no GPU back end, or finds no GPU"
)

HALF = 5e-3
"""Largest difference from numpy, relative to the largest number: GPUs may multiply in half precision."""
ROUNDED = 0.05
"""The same of a model: the processor rounds activations to 8 bits, most GPUs do not."""
PROMPT = 70
"""Tokens [count]: from 32 on, llama.cpp sends products to a GPU that it was not told to leave alone."""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("gpu")
    shape = shapes.get("llama-tiny")
    model = shapes.write(shape, work / "model")
    return {
        "factored": random_gguf.write_factored(model, "uniform:0.5", work / "factored"),
        "dense": random_gguf.write_quantised(shape, model, "Q4_0", work / "dense"),
    }


@pytest.mark.parametrize("kind", [k for k in decompose.kinds_of("linear") if k != "dense"])
def test_every_decomposition_agrees_with_numpy(kind: str) -> None:
    generator = np.random.default_rng(0)
    for spec in decompose.get(kind).exact(48, 64):
        contraction = contraction_of(spec, (48, 64), "linear")
        cores = {n: generator.standard_normal(s).astype(np.float32) for n, s in core_shapes(contraction).items()}
        for tokens in (1, 40):
            x = generator.standard_normal((tokens, 64)).astype(np.float32)
            expected = evaluate(contraction, cores, x)
            found = evaluate_on_ggml(contraction, cores, x, gpu=0)
            np.testing.assert_allclose(found, expected, atol=HALF * np.abs(expected).max(), rtol=0)


def test_every_lookup_agrees_with_numpy() -> None:
    generator = np.random.default_rng(0)
    for kind in decompose.kinds_of("embedding"):
        for spec in (Spec("dense"),) if kind == "dense" else decompose.get(kind).exact(96, 64):
            contraction = contraction_of(spec, (96, 64), "embedding")
            cores = {n: generator.standard_normal(s).astype(np.float32) for n, s in core_shapes(contraction).items()}
            ids = generator.integers(0, 96, 9).astype(np.int32)
            expected = evaluate(contraction, cores, ids)
            found = evaluate_on_ggml(contraction, cores, ids, gpu=0)
            np.testing.assert_allclose(found, expected, atol=HALF * np.abs(expected).max(), rtol=0)


def logits(folder: Path, gpu: int | None, kv_cache: str = "") -> NDArray[Any]:
    """Of a short text, then of a longer one: the memory of graphs grows in between."""
    model: Any = open_artifact(folder, RuntimeOptions(threads=1, kv_cache=kv_cache, gpu=gpu))
    ids = np.random.default_rng(1).integers(2, model.vocab_size, PROMPT)
    return np.concatenate([model.logits(ids[:9]), model.logits(ids)])


@pytest.mark.parametrize("kv_cache", ["", "q8_0"])
@pytest.mark.parametrize("name", ["factored", "dense"])
def test_a_model_agrees_with_the_processor(artifacts: dict[str, Path], name: str, kv_cache: str) -> None:
    expected = logits(artifacts[name], None, kv_cache)
    found = logits(artifacts[name], 0, kv_cache)
    apart = np.abs(found - expected).max()
    assert apart > 0, "both ran on one of the two"
    assert apart < ROUNDED * np.abs(expected).max()


@pytest.mark.parametrize("name", ["factored", "dense"])
def test_tokens_go_on_after_a_prompt(artifacts: dict[str, Path], name: str) -> None:
    model: Any = open_artifact(artifacts[name], RuntimeOptions(threads=1, gpu=0))
    prompt = np.random.default_rng(1).integers(2, model.vocab_size, PROMPT).tolist()
    tokens = list(model.forced(prompt, 6))
    again = model.logits(np.array(prompt + tokens))
    picked = again[np.arange(len(prompt) - 1, len(prompt) + 5), tokens]
    best = np.delete(again[len(prompt) - 1 : -1], [0, 1], axis=1).max(axis=1)
    np.testing.assert_allclose(picked, best, atol=ROUNDED * np.abs(again).max())
