"""onnxruntime on arm64.

KleidiAI's kernels want 4 bits, blocks of 32 and K a multiple of the block, so 4-bit is the default. 8-bit matmuls run
on dot-product kernels since onnxruntime 1.23 (before, they failed on Android: onnxruntime #24769, #25110). 2-bit
kernels are in too few of the builds that phones carry to plan for.
"""

from edgec.records import Target

PLUGIN = True

TARGET = Target(
    name="onnx-arm64",
    description="onnxruntime ≥ 1.23 / onnxruntime-genai on arm64 CPUs (phones, tablets, Raspberry Pi, Apple silicon)",
    dense_formats=("int8-b32", "int4-b32"),
    factored_formats=("int4-b32",),
    embedding_formats=("int8-b32", "int4-b32"),
    default_format="int4-b32",
    default_budget="5bpw",
    rank_multiple=32,
    k_multiple=32,
)
