"""onnxruntime on x86-64. 2-bit kernels are fast at blocks of 64 and 128 (AVX-512, AVX2); at 32, slower than 4-bit."""

from edgec.records import Target

PLUGIN = True

TARGET = Target(
    name="onnx-x64",
    description="onnxruntime / onnxruntime-genai on x86-64 CPUs (laptops, servers)",
    dense_formats=("int8-b32", "int8-b128", "int4-b32", "int4-b64", "int4-b128", "int2-b64", "int2-b128"),
    factored_formats=("int8-b32", "int4-b32", "int4-b64"),
    embedding_formats=("int8-b32", "int8-b128", "int4-b32", "int4-b64"),
    default_format="int4-b32",
    default_budget="5bpw",
)
