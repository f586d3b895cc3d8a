"""What a front end hands to the lowering: one dense graph whose nodes are known by their module names.

Encoders come from torch's exporter and decoders from onnxruntime-genai's builder. Both end in this record,
so that the lowering (replace a node by its contraction) is written once and knows neither exporter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

MICROSOFT = "com.microsoft"
"""The domain of onnxruntime's own operators."""


def constant(tensor: ir.TensorProtocol) -> ir.Value:
    """An initializer of that tensor's name, which a graph does not have yet."""
    shape, kind = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
    return ir.Value(name=tensor.name, const_value=tensor, shape=shape, type=kind)


@dataclass(frozen=True)
class DenseGraph:
    """A dense fp32 graph in memory, with its nodes mapped to the transformers modules they came from.

    linears: module name -> MatMul node, y = x @ Wt: x [..., in], Wt an initializer [in, out], y [..., out], fp32;
        the bias stays a separate Add (or the bias input of an attention node).
    embeddings: module name -> Gather node, data [V, d] fp32 (an initializer, or a path to the shared tied table).
    Every node appears exactly once and has one output; a weight is used by that node alone unless it is tied.
    """

    model: ir.Model
    linears: Mapping[str, ir.Node]
    embeddings: Mapping[str, ir.Node]
