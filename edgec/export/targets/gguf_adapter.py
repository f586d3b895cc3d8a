"""llama.cpp with a LoRA beside the model: low-bit backbones with low-rank corrections, added at run time.

Corrections are int8: Q8_0 factors cost no visible accuracy, and ranks are small. The adapter takes time, 12 to 18 % of
decoding at rank 64, so a plan with corrections ships only where it beats the best plan of `gguf` at the same budget.
"""

from dataclasses import replace

from edgec.export.targets.gguf import TARGET as STOCK

PLUGIN = True

TARGET = replace(
    STOCK,
    name="gguf-adapter",
    description="llama.cpp with an un-merged LoRA (adapter.gguf): low-bit backbones with low-rank corrections",
    residual_formats=("q3_k+int8-b32", "q2_k+int8-b32"),
    artifact="gguf_adapter",
    must_beat="gguf",
)
