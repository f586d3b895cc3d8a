"""What is trained is exactly what ships, and what ships is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgec import modeling
from edgec.checkpoint import open_checkpoint
from edgec.compress.store import assemble
from edgec.fit import Factors, fit
from edgec.heal.cores import FixedCore, QuantisedCore, Student
from edgec.quantize import rtn
from edgec.quantize.formats import CoreFormat, QuantizedTensor
from edgec.records import Spec

FORMATS = ["int8-b32", "int4-b32", "int4-b64-zp", "int2-b64", "int2-b32-zp"]


def core_of(name: str, n: int = 6, k: int = 100, seed: int = 0) -> QuantizedTensor:
    weight = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    return rtn.quantize(weight, CoreFormat.parse(name))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("lora_rank", [0, 3])
def test_an_untouched_core_comes_back_bit_for_bit(name: str, lora_rank: int) -> None:
    stored = core_of(name)
    core = QuantisedCore(stored, lora_rank)
    back = core.store()
    assert np.array_equal(core().detach().numpy(), stored.dequantize())
    assert np.array_equal(back.codes, stored.codes)
    assert np.array_equal(back.scales, stored.scales)
    assert back.scales.dtype == stored.scales.dtype


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(FORMATS), lora_rank=st.sampled_from([0, 2]), seed=st.integers(0, 1000))
def test_any_trained_state_ships_as_it_computes(name: str, lora_rank: int, seed: int) -> None:
    core = QuantisedCore(core_of(name, seed=seed), lora_rank)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, _ in core.rates():
            parameter.add_(0.7 * torch.randn(parameter.shape, generator=generator))
        core.gain.clamp_(-0.9, 3)
    core.confine()
    back = core.store()
    assert np.array_equal(core().detach().numpy(), back.dequantize())
    assert back.codes.max() < 1 << back.fmt.bits


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_the_straight_through_ones(name: str) -> None:
    stored = core_of(name)
    core = QuantisedCore(stored)
    upstream = torch.randn(stored.shape, generator=torch.Generator().manual_seed(1))
    core().backward(upstream)
    scales = torch.from_numpy(stored.scales.astype(np.float32))
    n, k = stored.shape
    padded = torch.zeros(n, scales.shape[1] * stored.fmt.block)
    padded[:, :k] = upstream
    blocks = padded.reshape(n, -1, stored.fmt.block)
    codes = core.offsets.detach().round()
    assert core.offsets.grad is not None and core.gain.grad is not None
    assert torch.allclose(core.offsets.grad, blocks * scales[:, :, None])
    assert torch.allclose(core.gain.grad, (blocks * codes).sum(-1) * scales, atol=1e-4)


def test_confined_codes_can_come_back() -> None:
    core = QuantisedCore(core_of("int2-b64", k=128))
    with torch.no_grad():
        core.offsets.fill_(40.0)
    core.confine()
    assert core.offsets.max() < core.high.max() + 0.5
    core().sum().backward()
    assert core.offsets.grad is not None and core.offsets.grad.abs().min() > 0


@pytest.fixture(scope="module")
def checkpoint(lm_source: Path) -> Any:
    return open_checkpoint(lm_source)


def factors_of(checkpoint: Any, *, tied: bool) -> dict[str, Factors]:
    model = modeling.load_dense(checkpoint)
    found = {}
    for layer in modeling.layers(model):
        weight: NDArray[Any] = model.get_parameter(f"{layer.name}.weight").detach().numpy()
        if layer.role == "linear":
            rank = min(layer.shape) // 64 * 32
            spec = Spec("svd", (rank,)) if "mlp" in layer.name else Spec("dense")
            found[layer.name] = fit(weight, spec, CoreFormat.parse("int4-b32"))
        elif layer.role == "embedding":
            found[layer.name] = fit(weight, Spec("dense"), CoreFormat.parse("int8-b32"), role="embedding")
        else:
            head = fit(weight, Spec("dense"), CoreFormat.parse("int8-b32"))
            found[layer.name] = Factors(head.contraction, found[str(layer.tied_to)].cores) if tied else head
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_a_student_computes_what_its_factors_say(checkpoint: Any, tied: bool) -> None:
    factors = factors_of(checkpoint, tied=tied)
    student = Student(modeling.load_dense(checkpoint), factors)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        own = student.model(input_ids=ids).logits
        expected = assemble(checkpoint, factors)(input_ids=ids).logits
    assert torch.allclose(own, expected, atol=1e-5)
    back = student.factors()
    for name, fitted in factors.items():
        assert fitted.contraction == back[name].contraction
        assert np.array_equal(fitted.dense(), back[name].dense()), name
    if tied:
        head, table = "lm_head", "model.embed_tokens"
        assert back[head].cores["weight"] is back[table].cores["weight"]


def test_only_what_costs_nothing_or_is_multiplied_learns(checkpoint: Any) -> None:
    factors = factors_of(checkpoint, tied=False)
    student = Student(modeling.load_dense(checkpoint), factors)
    learning = {id(p) for p, _ in student.rates()}
    trained = {name for name, p in student.model.named_parameters() if id(p) in learning}
    assert any(name.endswith("input_layernorm.weight") for name in trained)
    assert not any("embed_tokens" in name for name in trained)
    table: Any = student.model.get_submodule("model.embed_tokens")
    assert isinstance(table.cores.by_name["weight"], FixedCore)
    assert set(student.vectors()) == {n for n, p in modeling.load_dense(checkpoint).named_parameters() if p.dim() == 1}


def test_vectors_start_where_an_earlier_healing_left_them(checkpoint: Any) -> None:
    factors = factors_of(checkpoint, tied=False)
    first = Student(modeling.load_dense(checkpoint), factors)
    moved = {name: values + 0.5 for name, values in first.vectors().items()}
    second = Student(modeling.load_dense(checkpoint), factors, moved)
    assert all(np.array_equal(second.vectors()[name], values) for name, values in moved.items())
