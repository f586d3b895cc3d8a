"""Entropies of states that are known, and the line between structure and noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec.modeling import Layer
from edgec.profile.entropy import cut, looks_random, random_entropy, singular_values, von_neumann
from edgec.profile.profiler import describe


def gaussian(rows: int, cols: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def test_entropies_of_known_states() -> None:
    assert von_neumann(singular_values(np.ones((5, 7)))) == pytest.approx(0, abs=1e-6)  # a product state
    assert von_neumann(singular_values(np.eye(16))) == pytest.approx(np.log(16))  # maximally entangled
    two = np.diag([1.0, 1.0, 0, 0])
    assert von_neumann(singular_values(two)) == pytest.approx(np.log(2))
    assert von_neumann(np.array([np.sqrt(0.9), np.sqrt(0.1)])) == pytest.approx(-0.9 * np.log(0.9) - 0.1 * np.log(0.1))
    assert von_neumann(np.zeros(4)) == 0


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 30), cols=st.integers(1, 30), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 50))
def test_entropy_is_bounded_and_blind_to_scale(rows: int, cols: int, scale: float, seed: int) -> None:
    weight = gaussian(rows, cols, seed).astype(np.float64)
    found = von_neumann(singular_values(weight))
    assert -1e-9 <= found <= np.log(min(rows, cols)) + 1e-9
    assert von_neumann(singular_values(scale * weight)) == pytest.approx(found, abs=1e-6)
    assert von_neumann(singular_values(weight.T)) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (40, 40), (1, 8)])
def test_singular_values_are_numpys(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    np.testing.assert_allclose(singular_values(weight), np.linalg.svd(weight, compute_uv=False), rtol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (64, 512), (384, 1536), (1536, 384)])
def test_random_matrices_have_pages_entropy(shape: tuple[int, int]) -> None:
    found = von_neumann(singular_values(gaussian(*shape)))
    assert found == pytest.approx(random_entropy(*shape), rel=0.01)
    assert looks_random(found, *shape)


def test_structure_does_not_look_random() -> None:
    weight = gaussian(128, 128)
    u, s, vh = np.linalg.svd(weight)
    decaying = u @ np.diag(s / np.arange(1, 129) ** 0.5) @ vh
    assert not looks_random(von_neumann(singular_values(decaying)), 128, 128)


def test_a_cut_groups_first_modes_against_second_ones() -> None:
    first, second = gaussian(3, 4), gaussian(2, 5, 1)
    product = np.kron(first, second)  # W[o₁o₂, i₁i₂] = first[o₁, i₁] second[o₂, i₂]
    unfolding = cut(product, ((3, 4), (2, 5)))
    assert unfolding.shape == (12, 10)
    assert von_neumann(singular_values(unfolding)) == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(unfolding, np.outer(first.reshape(-1), second.reshape(-1)), rtol=1e-5)


def test_describe_tells_random_from_structured_layers() -> None:
    layer = Layer("x", "linear", (512, 512))
    random = describe(layer, gaussian(512, 512))
    assert random.incompressible
    assert len(random.singular) == 512
    assert random.entropy["svd"] == pytest.approx(random.random["svd"], rel=0.01)
    structured = describe(layer, gaussian(512, 40) @ gaussian(40, 512))
    assert not structured.incompressible
    assert set(structured.entropy) == set(structured.random) == {"svd", "16x16"}
    kron = describe(layer, np.kron(gaussian(16, 16), gaussian(32, 32, 1)))
    assert kron.entropy["16x16"] < 1e-3 < kron.entropy["svd"]


def test_tables_are_never_called_incompressible() -> None:
    assert not describe(Layer("t", "embedding", (256, 128)), gaussian(256, 128)).incompressible
