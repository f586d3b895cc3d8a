"""llama.cpp, any build of it, on a CPU.

Whole matrices only: llama.cpp runs no factored layer. int8-b32 and int4-b32 are Q8_0 and Q4_0 to the bit, quantised by
edgec's GPTQ and healed like any other core; the K and IQ types are ggml's own, fitted with the importance that
calibration measured. Q4_0 has the fastest kernels (repacked for AVX2, AVX-512 and dot-product instructions), so it is
what a uniform plan takes.
"""

from edgec.records import Target

PLUGIN = True

TARGET = Target(
    name="gguf",
    description="llama.cpp (llama-cpp-python, Ollama, LM Studio): one stock .gguf, factored layers multiplied out",
    dense_formats=(
        "int8-b32", "q6_k", "q5_k", "int4-b32", "q4_k", "iq4_xs", "q3_k", "iq3_xxs", "q2_k", "iq2_s",
    ),
    factored_formats=(),
    embedding_formats=("int8-b32", "q6_k", "int4-b32", "q4_k", "q3_k"),
    default_format="int4-b32",
    default_budget="5bpw",
    rank_multiple=32,
    k_multiple=32,
    artifact="gguf",
)  # fmt: skip
