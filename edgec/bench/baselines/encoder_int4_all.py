"""Everything at 4 bits by onnxruntime's own quantizer, embeddings too (GatherBlockQuantized): its smallest file."""

from __future__ import annotations

from pathlib import Path

from edgec.bench.baselines import DENSE_ONNX, copy_tokenizer

PLUGIN = True
TASKS = ("encoder",)
NAME = "int4-all"
TOOL = "onnxruntime MatMulNBitsQuantizer (block 32, accuracy level 4), embeddings at 4 bits too"
SOURCE = DENSE_ONNX


def build(source: Path, out: Path) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(source / "model.onnx"),
        bits=4,
        block_size=32,
        is_symmetric=True,
        accuracy_level=4,
        op_types_to_quantize=("MatMul", "Gather"),
        quant_axes=(("MatMul", 0), ("Gather", 1)),
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(out / "model.onnx"), use_external_data_format=False)
    copy_tokenizer(source, out)
