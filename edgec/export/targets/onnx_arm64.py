"""onnxruntime on arm64. KleidiAI's kernels want 4 bits, blocks of 32 and K a multiple of the block; there is no
2-bit in the wheels that phones carry, and 8-bit matmuls fail on some Android builds (onnxruntime #24769), so they
are for embeddings only.
"""

from edgec.records import Target

PLUGIN = True

TARGET = Target(
    name="onnx-arm64",
    description="onnxruntime / onnxruntime-genai on arm64 CPUs (phones, tablets, Raspberry Pi, Apple silicon)",
    dense_formats=("int4-b32",),
    factored_formats=("int4-b32",),
    embedding_formats=("int8-b32", "int4-b32"),
    default_format="int4-b32",
    default_budget="5bpw",
    rank_multiple=32,
    k_multiple=32,
)
