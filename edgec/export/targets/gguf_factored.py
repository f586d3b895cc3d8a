"""Factored layers on ggml's own kernels. Blocks of 32 along a row are what Q4_0 and Q8_0 are made of, so ranks and
inner dimensions are multiples of 32; products of 4 bits are packed for AVX2 and NEON where their rows divide by 8.
"""

from edgec.records import Target

PLUGIN = True

TARGET = Target(
    name="gguf-factored",
    description="edgec's ggml runtime (llama-cpp-python ≥ 0.3.36): factored layers on llama.cpp's kernels",
    dense_formats=("int8-b32", "int4-b32"),
    factored_formats=("int8-b32", "int4-b32"),
    embedding_formats=("int8-b32", "int4-b32"),
    default_format="int4-b32",
    default_budget="5bpw",
    rank_multiple=32,
    k_multiple=32,
    artifact="gguf_factored",
)
