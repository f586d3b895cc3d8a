"""Encoders' products as int8 matrix products, on weights that the session unpacks once, when it is created.

MatMulNBits keeps weights packed. That is right for a decoder, which multiplies one row and is bound by reading them.
An encoder multiplies a batch of sentences and is bound by arithmetic, which onnxruntime's int8 kernels (VNNI, AMX) do
three to seven times as fast as MatMulNBits and float products. So the file keeps its codes, and the graph says how they
become int8, one scale a row of W; all of that is constant, and onnxruntime folds it. One product y = x Wᵀ is

    xs = x · 1/smooth                                       [..., k]; only where the input's channels are known
    q, a, z = DynamicQuantizeLinear(xs)                     uint8 with one scale and zero point
    w, r = edgec.Unpack<bits>b<block>(codes, scales, rows, strong, smooth)      int8 [k, n], float32 [n]
    y = MatMulIntegerToFloat(q, w, a, r, z)

smooth moves the weight of a few strong input channels from the activations, which share one scale, into W (SmoothQuant,
Xiao et al. 2023, arXiv 2211.10438, equation 3, for the strongest channels alone): on MiniLM it takes 1 - cosine of
int8 activations from 0.006 to 0.002. Scales per token would give 0.001, but no kernel of onnxruntime takes them, and
the nodes around the product that make up for it cost a third of the speed. They were turned down.

The two's complement fields of `codes` [k, n · bits / 8] begin at the highest bits: byte j of a row holds the columns
j, j + n/2 (4 bits) or j, j + n/4, j + n/2, j + 3n/4 (2 bits). So one mask or shift and a concatenation unpack them.
Unpacking keeps up to 8 bytes a weight in memory until the session exists. An operator that does it at once would be
MatMulNBits on an identity, or GatherBlockQuantized; onnxruntime does not fold either.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgec.export.onnx.gelu import exact_gelus
from edgec.export.onnx.graph import MICROSOFT
from edgec.fit import Core
from edgec.quantize.formats import QuantizedTensor

DOMAIN = "edgec"
_OPSETS = {"": 21}
BIAS = 6
"""Place of a bias among the inputs of MatMulIntegerToFloat; `biases` puts it there."""
_LEAST_K = 64
"""Below it, quantising the input costs what the faster product gains: rotations are unpacked to floats."""
_BITS = (2, 4, 8)
_PAIR = 127
"""Largest sum of two neighbouring int8 weights of a row, before rounding. x86 CPUs without VNNI add the products of two
int8 weights and two uint8 inputs in 16 bits and saturate (vpmaddubsw): 255 · 128 fits, so no input of any model does.
A bound of 64 on every weight alone would say the same and cost MiniLM 0.0015 of cosine; this is about 87 of them."""
_STRONGEST, _EXPONENT = 64, 0.7
"""Of 1 to 128 channels and exponents of 0.3 to 1, among the best on MiniLM (calibrated on STS-B train, judged on other
sentences of it and on WikiText); the optimum is flat."""
_NAME = re.compile(r"Unpack(\d)b(\d+)(s?)f?")
_FP16_NORMAL_MIN = 2.0**-14

Constant = Callable[[str, NDArray[Any]], ir.Value]


def takes(core: Core) -> bool:
    """Can a core be unpacked so? Others stay MatMulNBits or floats."""
    if not isinstance(core, QuantizedTensor) or core.fmt.simulated or core.zero_points is not None:
        return False
    n, k = core.shape
    return core.fmt.bits in _BITS and k % core.fmt.block == 0 and n * core.fmt.bits % 8 == 0


def smoothing(rms: NDArray[np.floating[Any]]) -> NDArray[np.float16] | None:
    """rms [k] of a product's input channels → what each is divided by, powers of two (exact in any float), float16 [k].

    The 64 strongest channels, at most a quarter of all, come down towards the next strongest one; None where none is
    to be divided by more than 2, which is not worth a pass over the input.
    """
    rank = min(_STRONGEST, len(rms) // 4)
    reference = float(np.partition(rms, -rank - 1)[-rank - 1]) if rank else 0.0
    if reference <= 0:
        return None
    excess = np.maximum(rms / reference, 1.0).astype(np.float64) ** _EXPONENT
    factors = np.exp2(np.rint(np.log2(excess)).clip(0, 10)).astype(np.float16)
    return factors if (factors > 2).any() else None


class Int8Products:
    """Emits the nodes of products into one graph; products of one input share its quantization."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._inputs: dict[tuple[int, bytes], tuple[ir.Value, ...]] = {}
        self._strong: dict[bytes, list[ir.Value]] = {}
        self._values = 0

    def emit(
        self,
        x: ir.Value,
        core: QuantizedTensor,
        smooth: NDArray[np.float16] | None,
        constant: Constant,
        nodes: list[ir.Node],
        title: str,
    ) -> ir.Value:
        """The nodes of y = x coreᵀ, appended to `nodes`. constant: makes an initializer of the layer. title: names."""

        def node(op: str, inputs: list[ir.Value], outputs: int = 1, domain: str = "") -> ir.Node:
            made = ir.node(op, inputs, domain=domain, num_outputs=outputs)
            for output in made.outputs:  # short names: long ones were most of a graph's bytes
                self._values += 1
                output.name = f"int8/{self._values}"
            nodes.append(made)
            return made

        if core.shape[1] < _LEAST_K:
            weights = self._unpacked(core, None, constant, node, floats=True)[0]
            return node("MatMul", [x, weights]).outputs[0]
        key = b"" if smooth is None else smooth.tobytes()
        if smooth is not None and key not in self._strong:
            strong = np.flatnonzero(smooth > 1)
            self._strong[key] = [constant("strong", strong.astype(np.int32)), constant("smooth", smooth[strong, None])]
        if (id(x), key) not in self._inputs:
            scaled = x
            if smooth is not None:
                inverse = constant("inverse", 1 / smooth.astype(np.float32))
                scaled = node("Mul", [x, inverse]).outputs[0]
            self._inputs[id(x), key] = tuple(node("DynamicQuantizeLinear", [scaled], 3).outputs)
        q, a, z = self._inputs[id(x), key]
        w, r = self._unpacked(core, smooth, constant, node)
        product = node("MatMulIntegerToFloat", [q, w, a, r, z], domain=MICROSOFT)
        product.name, product.outputs[0].dtype = f"{title}/{product.op_type}", ir.DataType.FLOAT
        return product.outputs[0]

    def _unpacked(
        self,
        core: QuantizedTensor,
        smooth: NDArray[np.float16] | None,
        constant: Constant,
        node: Callable[..., ir.Node],
        *,
        floats: bool = False,
    ) -> Sequence[ir.Value]:
        """int8 [k, n] (float32 with floats) and the scales of its columns."""
        stored = [constant(name, array) for name, array in _operands(core, smooth).items()]
        stored += [] if smooth is None else self._strong[smooth.tobytes()]
        made = _function(core.fmt.bits, core.fmt.block, smoothed=smooth is not None, floats=floats)
        self.model.functions.setdefault(made.identifier(), made)
        self.model.opset_imports.setdefault(DOMAIN, 1)
        return node(made.name, stored, 2, DOMAIN).outputs


def use_float_activations(model: ir.Model) -> None:
    """Rewrite every product in place, and those inside an attention with it, to x times the weights that its codes
    stand for, neither rounded to int8, and make GELUs exact again: what the graph is compared with torch by.
    """
    for node in [n for n in model.graph if n.op_type in ("MatMulIntegerToFloat", "QAttention")]:
        q, w = node.inputs[0], node.inputs[1]
        quantised, unpacked = q.producer() if q else None, w.producer() if w else None
        if quantised is None or unpacked is None:
            continue
        if node.op_type == "QAttention":  # see `attention`; its weights are three products' side by side
            operands = [quantised.inputs[0], w, node.inputs[2], node.inputs[5]]
            new = [ir.node("Attention", operands, domain=MICROSOFT, attributes=node.attributes, name=node.name)]
        elif unpacked.domain != DOMAIN:
            continue
        else:
            new = [ir.node("MatMul", [quantised.inputs[0], w], name=node.name)]
            if len(node.inputs) > BIAS:
                new.append(ir.node("Add", [new[0].outputs[0], node.inputs[BIAS]]))
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], new, node.outputs, new[-1].outputs)
        if not any(output.uses() for output in quantised.outputs):
            model.graph.remove(quantised, safe=True)
    exact_gelus(model.graph)
    for identifier, function in list(model.functions.items()):
        if function.domain == DOMAIN:
            bits, block, smoothed = _NAME.fullmatch(function.name).groups()  # type: ignore[union-attr]
            made = _function(int(bits), int(block), smoothed=bool(smoothed), floats=True)
            model.functions[identifier] = ir.Function(*identifier, graph=made.graph, attributes=[])


def _operands(core: QuantizedTensor, smooth: NDArray[np.float16] | None) -> dict[str, NDArray[Any]]:
    """What a product stores: codes [k, n·bits/8], scales [k/block, n], rows [n]."""
    bits, (n, k) = core.fmt.bits, core.shape
    levels = core.codes[:, :k].astype(np.int16) - core.fmt.zero
    fields = 8 // bits
    columns = np.ascontiguousarray(levels.T).reshape(k, fields, n // fields)
    packed = np.zeros((k, n // fields), np.uint8)
    for field in range(fields):
        packed |= ((columns[:, field] << (8 - bits * (field + 1))) & _mask(bits, field)).astype(np.uint8)
    weights = core.dequantize()
    magnitudes = np.abs(weights if smooth is None else weights * smooth.astype(np.float32))
    largest = magnitudes.reshape(n, k // 2, 2).sum(axis=2).max(axis=1)
    rows = np.where(largest > 0, largest / _PAIR, 1.0).astype(np.float32)
    codes = packed.view(np.int8) if bits == 8 else packed
    return {
        "codes": codes,
        "scales": np.ascontiguousarray(core.scales.T),
        # Not `storable`, which looks at the largest alone: each row's scale needs all of its bits.
        "rows": rows.astype(np.float16) if rows.min() >= _FP16_NORMAL_MIN and rows.max() < 6e4 else rows,
    }


def _mask(bits: int, field: int) -> int:
    return (((1 << bits) - 1) << (8 - bits * (field + 1))) & 0xFF


def _function(bits: int, block: int, *, smoothed: bool, floats: bool = False) -> ir.Function:
    """codes, scales, rows (and strong [s], the channels that are smoothed, and smooth [s, 1]) → int8 [k, n], and rows
    as float32; with floats, the weights unrounded.

    onnxruntime folds only what has a CPU kernel, so float16, which takes half the memory while a session is made, may
    be cast and quantised but not multiplied. Strong rows are computed apart in float32.
    """
    names = ["codes", "scales", "rows", *(["strong", "smooth"] if smoothed else [])]
    given = {name: ir.Value(name=name) for name in names}
    nodes: list[ir.Node] = []

    def op(kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        nodes.append(ir.node(kind, list(inputs), attributes=attributes))
        output: ir.Value = nodes[-1].outputs[0]
        output.name = f"v{len(nodes)}"
        return output

    def number(value: Any, dtype: Any) -> ir.Value:
        return op("Constant", value=ir.tensor(np.array(value, dtype)))

    def wide(value: ir.Value) -> ir.Value:
        return op("Cast", value, to=ir.DataType.FLOAT)

    codes = given["codes"]
    if bits < 8:
        top, parts = number(_mask(bits, 0), np.uint8), []
        for field in range(8 // bits):
            part = codes
            if field:
                part = op("BitShift", part, number(bits * field, np.uint8), direction="LEFT")
            if field < 8 // bits - 1:  # the last shift leaves nothing below its field
                part = op("BitwiseAnd", part, top)
            parts.append(part)
        codes = op("Cast", op("Concat", *parts, axis=1), to=ir.DataType.INT8)
    rows, scales = wide(given["rows"]), op("Div", wide(given["scales"]), number(float(1 << (8 - bits)), np.float32))
    places = None
    if smoothed:
        places = op("Unsqueeze", op("Cast", given["strong"], to=ir.DataType.INT64), number([1], np.int64))
    if floats:
        # Not DequantizeLinear: onnxruntime makes a MatMulNBits of it and its MatMul, with int8 activations of its own.
        spread = op("Expand", op("Unsqueeze", scales, number([1], np.int64)), number([1, block, 1], np.int64))
        weights = op("Mul", wide(codes), op("Reshape", spread, op("Shape", codes)))
        if places is not None:
            strong = op("Mul", op("Gather", weights, given["strong"], axis=0), wide(given["smooth"]))
            weights = op("ScatterND", weights, places, strong)
    else:
        ratio = op("Div", rows, scales)
        narrow = op("Cast", ratio, to=ir.DataType.FLOAT16)
        zeros = op("ConstantOfShape", op("Shape", ratio), value=ir.tensor(np.zeros(1, np.int8)))
        levels = op("Cast", codes, to=ir.DataType.FLOAT16)
        weights = op("QuantizeLinear", levels, narrow, zeros, axis=0, block_size=block)
        if places is not None:
            strong = op("Mul", wide(op("Gather", codes, given["strong"], axis=0)), wide(given["smooth"]))
            own = op("Gather", ratio, op("Div", given["strong"], number(block, np.int32)), axis=0)
            rounded = op("Cast", op("Round", op("Div", strong, own)), to=ir.DataType.INT8)
            weights = op("ScatterND", weights, places, rounded)
    graph = ir.Graph(list(given.values()), [weights, rows], nodes=nodes, opset_imports=_OPSETS)
    name = f"Unpack{bits}b{block}{'s' if smoothed else ''}{'f' if floats else ''}"
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])
