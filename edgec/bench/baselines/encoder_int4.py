"""onnxruntime's own 4-bit linears (MatMulNBits, block 32, accuracy level 4) with its own int8 embeddings.

The MatMulNBits quantizer (1.31) quantises an embedding to 4 bits or not at all. Left at fp32 it would be half of a
small encoder, which nobody would ship, so onnxruntime's dynamic quantizer does the embeddings: int8, as in the
figures that compare methods on linears.
"""

from __future__ import annotations

from pathlib import Path

from edgec.bench.baselines import DENSE_ONNX, copy_tokenizer

PLUGIN = True
TASKS = ("encoder",)
NAME = "int4"
TOOL = "onnxruntime MatMulNBitsQuantizer (block 32, accuracy level 4), embeddings int8 by quantize_dynamic"
SOURCE = DENSE_ONNX
BLOCK = 32
ACCURACY_LEVEL = 4


def build(source: Path, out: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = out / "model.onnx"
    quantize_dynamic(source / "model.onnx", model, op_types_to_quantize=["Gather"], weight_type=QuantType.QInt8)
    quantizer = MatMulNBitsQuantizer(
        onnx.load(model), bits=4, block_size=BLOCK, is_symmetric=True, accuracy_level=ACCURACY_LEVEL
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(model), use_external_data_format=False)
    copy_tokenizer(source, out)
