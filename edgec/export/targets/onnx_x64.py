"""onnxruntime on x86-64. 2-bit kernels are fast at blocks of 64 and 128 (AVX-512, AVX2); at 32, slower than 4-bit.

Two bits are for whole matrices and backbones only: on MiniLM, two-bit factors at the bytes of four-bit ones of half
their rank had 1.1 to 1.6 times their functional error. Of the backbones, blocks of 128 with a four-bit correction
give the least error per byte: a correction at eight bits takes 1 to 3 % off the error for 0.4 bits and more,
and blocks of 64, or four-bit backbones with a correction, lie above the hull of what else there is.

Zero points are not offered. Over pycode-lm's linears, fitted with coordinate descent, they take 3, 7 and 10 % off the
squared error of int4 at blocks of 128, 64 and 32 for 0.03, 0.06 and 0.13 bits, which is what a smaller block takes off
for the same bits; at two bits they make it 3 % worse.

A rotation in front takes 4 to 8 % off the error of a matrix at its own bytes, and adds 2 to 8 % to the time of its
product (one thread, 1536 × 384 and 2048 × 2048, 1 and 128 rows; onnxruntime 1.31). Those were packed
products; beside an encoder's int8 ones a rotation is too slow to be searched (`targets.offered`).
"""

from edgec.records import Target

PLUGIN = True

TARGET = Target(
    name="onnx-x64",
    description="onnxruntime / onnxruntime-genai on x86-64 CPUs (laptops, servers)",
    dense_formats=("int8-b32", "int8-b128", "int4-b32", "int4-b64", "int4-b128", "int2-b64", "int2-b128"),
    factored_formats=("int8-b32", "int4-b32", "int4-b64"),
    embedding_formats=("int8-b32", "int8-b128", "int4-b32", "int4-b64", "int2-b32", "int2-b64"),
    default_format="int4-b32",
    default_budget="5bpw",
    residual_formats=("int2-b128+int4-b32",),
    rotated_formats=("int4-b32", "int2-b64+int8-b32"),
    encoder_arithmetic="int8",
)
