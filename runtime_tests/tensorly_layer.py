"""One layer as a tensor train, by edgec and by TensorLy-Torch: `python -m runtime_tests.tensorly_layer`.

TensorLy-Torch (Kossaifi et al. 2019) is the library that people reach for who want tensor-network layers in torch; it
compresses no model and exports none, so it is compared where it can be. The first feed-forward matrix of a block of
all-MiniLM-L6-v2 becomes one tensor train, whose cores both hold: in matrix form (interleaved order), and with all
outputs before all inputs, which is low rank and what edgec's plans mostly choose. That both compute the same is checked
before anything is timed. Everybody runs in this process in turn, in fp32.

Needs `pip install --no-deps tensorly-torch tensorly opt_einsum`; no part of edgec does.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from edgec.compress.modules import FactoredLinear
from edgec.decompose.tensor_train import size
from edgec.export.onnx.graph import DenseGraph
from edgec.export.onnx.lowering import lower
from edgec.fit import Factors, fit
from edgec.quantize.formats import LayerFormat
from edgec.records import Spec
from edgec.runtime.options import RuntimeOptions, session_options
from runtime_tests.models import minilm_folder

Floats = NDArray[np.float32]
Layer = Callable[[Floats], Floats]

TRAINS = (
    Spec("tensor_train", (32, 32), ((12, 6), (16, 8), (8, 8))),
    Spec("tensor_train", (70,), ((1536, 1), (1, 384))),
)
"""Of equal size. Modes are (outputs, inputs) of each core: 1536 x 384 in all."""
AGREEMENT = 1e-5
"""Largest relative difference between two that compute the same in fp32."""
ROWS = (1, 128)
_ROUNDS, _SECONDS = 15, 0.05
_THEIRS = "train, TensorLy-Torch, factorized"


def main() -> None:
    """Prints the table; ends with an error when two do not compute the same."""
    parser = argparse.ArgumentParser(prog="python -m runtime_tests.tensorly_layer", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    threads: int = parser.parse_args().threads
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    weight = load_file(minilm_folder() / "model.safetensors")["encoder.layer.2.intermediate.dense.weight"]
    for spec in TRAINS:
        _compare(weight.astype(np.float32), spec, threads)


def _compare(weight: Floats, spec: Spec, threads: int) -> None:
    factors = fit(weight, spec, LayerFormat.parse("fp32"))
    train = factors.dense().astype(np.float32)
    layers = {
        "dense, torch": _torch(_linear(weight)),
        "dense, onnxruntime": _onnx(weight, None, threads),
        _THEIRS: _torch(_tensorly(factors, spec, "factorized")),
        "train, TensorLy-Torch, reconstructed": _torch(_tensorly(factors, spec, "reconstructed")),
        "train, edgec's torch module": _torch(FactoredLinear.from_factors(factors)),
        "train, edgec's export, onnxruntime": _onnx(weight, factors, threads),
    }
    columns = [f"{rows} row{'s' * (rows > 1)}" for rows in ROWS]
    timed = [_measured(layers, rows, lambda name: train if name.startswith("train") else weight) for rows in ROWS]
    table = Table(
        "layer", "parameters", *(f"{column}, µs" for column in columns),
        title=f"MiniLM, block 2, 1536 x 384; modes {spec.modes}, χ {spec.ranks}; {threads} thread(s), fp32",
    )
    for name in layers:
        own = size(spec.modes, spec.ranks) if name.startswith("train") else weight.size
        table.add_row(name, f"{own:,}", *(_shown(found[name]) for found in timed))
    console = Console(width=100)
    console.print(table)
    for column, found in zip(columns, timed, strict=True):
        base = float(np.median(found[_THEIRS]))
        for name in list(layers)[-2:]:
            console.print(f"{name} ÷ TensorLy-Torch, speed at {column}: {base / float(np.median(found[name])):.2f}")


def _measured(layers: Mapping[str, Layer], rows: int, wanted: Callable[[str], Floats]) -> dict[str, list[float]]:
    """Seconds of one call, one median a round and layer, the order turning. Raises SystemExit for a wrong answer."""
    x = np.random.default_rng(rows).standard_normal((rows, 384)).astype(np.float32)
    for name, layer in layers.items():
        expected = x.astype(np.float64) @ wanted(name).astype(np.float64).T
        error = float(np.linalg.norm(layer(x).reshape(expected.shape) - expected) / np.linalg.norm(expected))
        if not error <= AGREEMENT:
            raise SystemExit(f"{name} is off by {error:.1e}, at most {AGREEMENT:.0e} is rounding")
    found: dict[str, list[float]] = {name: [] for name in layers}
    names = list(layers)
    for done in range(_ROUNDS):
        for name in names[done % len(names) :] + names[: done % len(names)]:
            calls: list[float] = []
            while sum(calls) < _SECONDS:
                begun = time.perf_counter()
                layers[name](x)
                calls.append(time.perf_counter() - begun)
            found[name].append(float(np.median(calls)))
    return found


def _torch(module: torch.nn.Module) -> Layer:
    return lambda x: module(torch.from_numpy(x)).numpy()


def _linear(weight: Floats) -> torch.nn.Module:
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = torch.nn.Parameter(torch.from_numpy(weight))
    return module


def _tensorly(factors: Factors, spec: Spec, implementation: str) -> torch.nn.Module:
    """Their layer holding our cores: core_k [o·χ', i·χ] → [χ', o, i, χ]."""
    try:
        import tltorch
    except ImportError as error:
        raise SystemExit(f"{error}; pip install --no-deps tensorly-torch tensorly opt_einsum") from error
    outs, ins = zip(*spec.modes, strict=True)
    ranks = (1, *spec.ranks, 1)
    layer: Any = tltorch.FactorizedLinear(
        ins, outs, bias=False, factorization="blocktt", rank=ranks, implementation=implementation
    )
    for k, (o, i) in enumerate(spec.modes):
        core = factors.values()[f"core{k + 1}"].reshape(o, ranks[k], i, ranks[k + 1]).transpose(1, 0, 2, 3)
        layer.weight.factors[k].copy_(torch.from_numpy(np.ascontiguousarray(core)))
    return layer


def _onnx(weight: Floats, factors: Factors | None, threads: int) -> Layer:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", weight.shape[1]]))
    stored = ir.Value(name="weight", const_value=ir.tensor(np.ascontiguousarray(weight.T), name="weight"))
    stored.shape, stored.dtype = ir.Shape(weight.T.shape), ir.DataType.FLOAT
    node = ir.node("MatMul", [x, stored], name="layer")
    y = node.outputs[0]
    y.name, y.shape, y.dtype = "y", ir.Shape(["rows", weight.shape[0]]), ir.DataType.FLOAT
    graph = ir.Graph([x], [y], nodes=[node], initializers=[stored], opset_imports={"": 21}, name="layer")
    dense = DenseGraph(ir.Model(graph, ir_version=10), {"layer": node}, {})
    if factors is not None:
        lower(dense, {"layer": factors}, accuracy_level=4)
    options = session_options(RuntimeOptions(threads))
    session = ort.InferenceSession(
        ir.serde.serialize_model(dense.model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x": x})[0]


def _shown(seconds: list[float]) -> str:
    low, middle, high = (1e6 * float(q) for q in np.quantile(seconds, (0.25, 0.5, 0.75)))
    return f"{middle:.0f} [{low:.0f}, {high:.0f}]"


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
