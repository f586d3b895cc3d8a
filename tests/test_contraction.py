"""The step IR: what fits, what it costs, and that every backend-independent number agrees with a brute count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec.contraction import (
    BlockMatMul,
    Contraction,
    Gather,
    MatMul,
    NumpyOps,
    ReduceSum,
    Reshape,
    Scale,
    Step,
    Sum,
    Transpose,
    core_shapes,
    dense,
    evaluate,
    flops,
    infer_shape,
    parameters,
    quantisable,
    run,
)
from edgec.errors import PlanError

LOW_RANK = Contraction(6, 8, (MatMul("b", 3, 8), MatMul("a", 6, 3)))
RESIDUAL = Contraction(
    6,
    8,
    (
        BlockMatMul("turn", 4, 2),
        Sum(((MatMul("w", 6, 8),), (MatMul("b", 2, 8), Scale("s", 2), MatMul("a", 6, 2)))),
    ),
)
CP = Contraction(
    6,
    8,
    (
        Reshape((2, 4)),
        MatMul("c", 5, 4),
        Transpose((1, 0)),
        Reshape((5, 2)),
        Transpose((1, 0)),
        Scale("s", 5),
        ReduceSum(0),
        MatMul("a", 6, 5),
    ),
)
TABLE = Contraction(6, 50, (Sum(((Gather("t", 50, 6),), (Gather("u", 50, 2), MatMul("v", 6, 2)))),))
ALL = {"low rank": LOW_RANK, "residual": RESIDUAL, "cp": CP, "table": TABLE}


def cores_of(contraction: Contraction, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape) for name, shape in core_shapes(contraction).items()}


class CountingOps(NumpyOps):
    """Counts what the reference really multiplies and adds."""

    def __init__(self, cores: dict[str, np.ndarray[Any, Any]]) -> None:
        super().__init__(cores)
        self.count = 0

    def matmul(self, x: Any, core: str) -> Any:
        y = super().matmul(x, core)
        self.count += 2 * y.size * self.cores[core].shape[1]
        return y

    def block_matmul(self, x: Any, core: str) -> Any:
        self.count += 2 * x.size * self.cores[core].shape[1]
        return super().block_matmul(x, core)

    def scale(self, x: Any, core: str) -> Any:
        self.count += x.size
        return super().scale(x, core)

    def reduce_sum(self, x: Any, axis: int, trailing: int) -> Any:
        self.count += x.size
        return super().reduce_sum(x, axis, trailing)


@pytest.mark.parametrize("name", ALL)
def test_flops_are_what_one_row_costs(name: str) -> None:
    contraction = ALL[name]
    ops = CountingOps(cores_of(contraction))
    x = np.array([3]) if contraction.lookup else np.ones((1, contraction.in_features))
    run(contraction.steps, ops, x, contraction.start)
    assert flops(contraction) == ops.count > 0


@pytest.mark.parametrize("name", ALL)
def test_dense_is_the_linear_map(name: str) -> None:
    contraction, generator = ALL[name], np.random.default_rng(1)
    cores = cores_of(contraction)
    matrix = dense(contraction, cores)
    if contraction.lookup:
        ids = generator.integers(0, contraction.in_features, (2, 3))
        expected, x = matrix[ids], ids
    else:
        x = generator.standard_normal((2, 3, contraction.in_features))
        expected = x @ matrix.T
    np.testing.assert_allclose(evaluate(contraction, cores, x), expected, rtol=1e-12, atol=1e-12)


def test_parameters_and_quantisable_cores() -> None:
    assert parameters(LOW_RANK) == 3 * 8 + 6 * 3
    assert parameters(RESIDUAL) == 4 * 2 * 2 + 6 * 8 + 2 * 8 + 2 + 6 * 2
    assert quantisable(RESIDUAL) == {"w", "a", "b"}
    assert list(core_shapes(RESIDUAL)) == ["turn", "w", "b", "s", "a"]


@pytest.mark.parametrize(
    "step",
    [
        MatMul("w", 4, 7),
        BlockMatMul("w", 3, 3),
        Scale("w", 7),
        ReduceSum(1),
        ReduceSum(-1),
        Reshape((3, 3)),
        Reshape((-2, -4)),
        Transpose((1, 0)),
        Gather("w", 10, 4),
        Sum(()),
        Sum(((MatMul("a", 3, 8),), (MatMul("b", 4, 8),))),
    ],
    ids=str,
)
def test_an_ill_fitting_step_is_named(step: Step) -> None:
    with pytest.raises(PlanError, match="does not fit") as caught:
        infer_shape((step,), (8,))
    assert str(step) in str(caught.value)


def test_groups_need_the_only_trailing_axis() -> None:
    with pytest.raises(PlanError, match="does not fit"):
        Contraction(8, 8, (Reshape((2, 4)), BlockMatMul("turn", 2, 2), Reshape((8,))))


def test_more_than_three_trailing_axes_are_refused() -> None:
    assert infer_shape((Reshape((2, 2, 2)),), (8,)) == (2, 2, 2)
    with pytest.raises(PlanError, match="4 trailing axes"):
        infer_shape((Reshape((2, 2, 2, 1)), Reshape((8,))), (8,))
    with pytest.raises(PlanError, match="4 trailing axes"):
        Contraction(8, 8, (Sum(((Reshape((2, 2, 2, 1)), Reshape((8,))),)),))


def test_a_contraction_must_end_where_it_says() -> None:
    with pytest.raises(PlanError, match=r"\(3,\), expected \(6,\)"):
        Contraction(6, 8, (MatMul("b", 3, 8),))
    with pytest.raises(PlanError, match="at least one step"):
        Contraction(8, 8, ())


def test_one_core_has_one_shape() -> None:
    with pytest.raises(PlanError, match="'a' is used as"):
        core_shapes(Contraction(8, 8, (MatMul("a", 4, 8), MatMul("a", 8, 4))))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    lead=st.lists(st.integers(1, 3), max_size=2),
    data=st.data(),
)
def test_leading_axes_pass_through(shape: list[int], lead: list[int], data: st.DataObject) -> None:
    """Steps on [lead..., trailing...] equal the same steps on every leading index alone."""
    size, trailing = int(np.prod(shape)), tuple(shape)
    perm = tuple(data.draw(st.permutations(range(len(shape)))))
    axis = data.draw(st.integers(0, len(shape) - 1))
    last = trailing[perm[-1]]
    steps: tuple[Step, ...] = (Reshape(trailing), Transpose(perm), MatMul("m", 3, last), ReduceSum(axis))
    after = infer_shape(steps, (size,))
    cores = {"m": np.random.default_rng(0).standard_normal((3, last))}
    x = np.random.default_rng(1).standard_normal((*lead, size))
    y = run(steps, NumpyOps(cores), x, (size,))
    assert y.shape == (*lead, *after)
    rows = [run(steps, NumpyOps(cores), row, (size,)) for row in x.reshape(-1, size)]
    np.testing.assert_allclose(y.reshape(-1, *after), np.stack(rows))
