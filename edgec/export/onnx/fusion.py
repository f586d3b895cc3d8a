"""onnxruntime's own operators out of the small ones that torch writes: attention, layer norm, bias + gelu.

onnxruntime's transformer optimizer recognises none of the attentions that the dynamo exporter writes; the rules of
onnxscript do. Their bundle (`ort_fusions.optimize_for_ort`) is not used whole: its `fuse_attention` packs q, k and v
into one weight, and its FusedMatMul rules may swallow a linear's MatMul. The lowering replaces those nodes.

onnxruntime's SkipLayerNormalization is not used: on x86-64 it runs element by element. One Sum of residual, product and
bias, and a LayerNormalization, which is vectorised, take a quarter of its time (MiniLM, batches of 32, one thread of a
Xeon: 87 µs a sentence for all twelve against 343; onnxruntime 1.31). It has to be a Sum: onnxruntime itself makes the
slow operator of Add and LayerNormalization. (An int8 product adds its bias itself, see `biases`: two are left to sum.)
On arm64 it is the same source, but no hardware was at hand to measure it.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter import pattern
from onnxscript.rewriter.ort_fusions import shape_optimization
from onnxscript.rewriter.ort_fusions.bias_gelu import fuse_bias_gelu
from onnxscript.rewriter.ort_fusions.erfgelu import fuse_erfgelu
from onnxscript.rewriter.ort_fusions.mha import fuse_mha2
from onnxscript.rewriter.ort_fusions.mha_bias import fuse_mha_bias
from onnxscript.rewriter.ort_fusions.mha_scale import fuse_mha_scale
from onnxscript.rewriter.ort_fusions.sdpa import fuse_sdpa
from onnxscript.rewriter.ort_fusions.sdpa_via_mha import replace_sdpa_by_mha
from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_layer_normalization

from edgec.export.onnx.graph import MICROSOFT

MODULE = "edgec.module"
"""Metadata key that holds, on the one MatMul or Gather of a module, the module's name, until the export is done."""


def simplify(model: ir.Model) -> None:
    """Fold constants and drop what no output needs, in place. Ensures that nodes marked with MODULE stay."""
    passes.ShapeInferencePass()(model)
    _optimize(model)


def fuse(model: ir.Model) -> None:
    """Fuse in place; a pattern that is not there is left as it was. Requires `simplify`.

    Ensures that nodes marked with MODULE stay.
    """
    shape_optimization.rules.apply_to_model(model)
    _optimize(model)
    fuse_erfgelu(model)
    fuse_skip_layer_normalization(model)
    _one_bias.apply_to_model(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.ShapeInferencePass()(model)
    fuse_sdpa(model, apply_shape_inference=True)
    fuse_mha2(model)
    fuse_mha_scale(model)
    fuse_mha_bias(model)
    fuse_bias_gelu(model)
    replace_sdpa_by_mha(model)
    _split_skips(model.graph)
    _optimize(model)
    if any(node.domain == MICROSOFT for node in model.graph):
        model.opset_imports[MICROSOFT] = 1


def _optimize(model: ir.Model) -> None:
    # A marked node may be constant (a projection of position embeddings) and must still be there to be replaced.
    optimize_ir(model, should_fold=lambda node: False if MODULE in node.metadata_props else None)


def _split_skips(graph: ir.Graph) -> None:
    """Put Sum and LayerNormalization in the place of every SkipLayerNormalization. (The rules that find attention want
    the latter's form, so that it is there in between.)
    """
    for node in [n for n in graph if n.op_type == "SkipLayerNormalization"]:
        x, skip, gamma, beta, *bias = node.inputs
        total = ir.node("Sum", [v for v in (x, skip, *bias) if v is not None])
        normed = ir.node(
            "LayerNormalization",
            [total.outputs[0], gamma, beta],
            attributes={"axis": -1, "epsilon": node.attributes.get_float("epsilon", 1e-12)},
        )
        old, new = list(node.outputs[:1]), list(normed.outputs)
        if len(node.outputs) > 3 and node.outputs[3].name:  # the sum itself, where something else reads it
            old, new = [*old, node.outputs[3]], [*new, *total.outputs]
        ir.convenience.replace_nodes_and_values(graph, node, [node], [total, normed], old, new)


def _two_biases(op: Any, score: Any, bias: Any, mask: Any) -> Any:
    return op.Softmax(op.Add(op.Add(score, bias), mask), axis=-1)


def _sum_of_biases(op: Any, score: Any, bias: Any, mask: Any) -> Any:
    return op.Softmax(op.Add(score, op.Add(bias, mask)), axis=-1)


_one_bias = pattern.RewriteRuleSet([pattern.RewriteRule(_two_biases, _sum_of_biases)])
"""MPNet adds relative positions and mask to the scores one after the other; the attention operator takes one bias."""
