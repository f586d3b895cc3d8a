"""Pairs of formats survive the folder; what is only simulated never gets into one, nor into a graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs_for_tests import LAYER, linear_graph

from edgec import modeling
from edgec.checkpoint import open_checkpoint
from edgec.compress.apply import fit_choices
from edgec.compress.store import open_compressed, read_factors, save_compressed
from edgec.errors import PlanError
from edgec.export.onnx.lowering import lower
from edgec.export.targets import get_target
from edgec.fit import Factors, fit
from edgec.plan.files import read_plan, write_plan
from edgec.plan.planner import constrained_plan, make_choice
from edgec.quantize.formats import LayerFormat, QuantizedTensor
from edgec.records import Plan, Spec


def fitted(folder: Path, spec: Spec, fmt: str) -> tuple[Plan, dict[str, Factors]]:
    """The first block linear as asked, everything else in fp32."""
    checkpoint = open_checkpoint(folder)
    model = modeling.load_dense(checkpoint)
    layers = modeling.layers(model)
    plan = constrained_plan("dense:fp32", layers, get_target("onnx-x64"), checkpoint.fingerprint)
    first = next(layer for layer in layers if layer.role == "linear")
    changed = {**plan.by_layer(), first.name: make_choice(first, spec, LayerFormat.parse(fmt))}
    plan = replace(plan, choices=tuple(changed.values()))
    factors = fit_choices(
        plan.choices, lambda name: model.get_parameter(f"{name}.weight").numpy(), layers, lambda name: None
    )
    return plan, factors


def test_a_pair_of_formats_round_trips(lm_source: Path, tmp_path: Path) -> None:
    plan, factors = fitted(lm_source, Spec("residual", (8,)), "int2-b16+int4-b16")
    text = write_plan(plan)
    (tmp_path / "plan.yaml").write_text(text, encoding="utf-8")
    assert read_plan(tmp_path / "plan.yaml", modeling.layers(modeling.skeleton(open_checkpoint(lm_source)))) == plan
    save_compressed(open_checkpoint(lm_source), plan, factors, text, tmp_path / "out")
    found = read_factors(open_compressed(tmp_path / "out"))
    assert found.keys() == factors.keys()
    name = next(c.layer for c in plan.choices if c.spec.kind == "residual")
    formats = {n: str(core.fmt) for n, core in found[name].cores.items() if isinstance(core, QuantizedTensor)}
    assert formats == {"backbone": "int2-b16", "core2": "int4-b16", "core1": "int4-b16"}
    for core, values in factors[name].values().items():
        np.testing.assert_array_equal(found[name].values()[core], values)


@pytest.mark.parametrize("fmt", ["int3-b16", "fp8-e4m3"])
def test_simulated_formats_are_not_saved(fmt: str, lm_source: Path, tmp_path: Path) -> None:
    plan, factors = fitted(lm_source, Spec("dense"), fmt)
    with pytest.raises(PlanError, match=f"{fmt} is simulated"):
        save_compressed(open_checkpoint(lm_source), plan, factors, write_plan(plan), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fmt", ["int3-b16", "fp8-e4m3"])
def test_simulated_formats_are_not_exported(fmt: str) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    with pytest.raises(PlanError, match=f"{fmt} is simulated"):
        lower(linear_graph(weight), {LAYER: fit(weight, Spec("dense"), LayerFormat.parse(fmt))}, accuracy_level=0)
