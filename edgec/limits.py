"""The caps that rooms share, named, with their units; those of one format or device stand beside its reader. Untrusted
input is checked against them before allocation.
"""

from __future__ import annotations

MAX_JSON_BYTES = 64 * 1024 * 1024
"""Largest JSON file of a checkpoint that is parsed [bytes]; real tokenizers reach about 35 MB."""

MAX_JSON_DEPTH = 64
"""Deepest nesting of a parsed JSON file [levels]."""

MAX_SAFETENSORS_HEADER_BYTES = 100_000_000
"""Largest safetensors header [bytes]; the format's own limit."""

MAX_GGUF_HEADER_BYTES = 128 * 1024 * 1024
"""Most metadata and tensor infos of one GGUF file [bytes]; 262,000 tokens with merges take about 15 MB."""

MAX_GGUF_PAIRS = 65_536
"""Most metadata pairs of one GGUF file [count]; models have some dozens."""

MAX_GGUF_KEY_BYTES = 65_535
"""Longest metadata key of a GGUF file [bytes]; the format's own limit."""

MAX_GGUF_STRINGS = 1 << 21
"""Most strings in the metadata arrays of one GGUF file [count]; the largest vocabularies have 0.8 million."""

MAX_TOKEN_CHARACTERS = 512
"""Longest token of a GGUF's vocabulary [characters]; rebuilding merges takes the square of it."""

PROBE_TIMEOUT_S = 120
"""Longest that llama.cpp may take to read a vocabulary [seconds]."""

MAX_TENSORS = 1_000_000
"""Most tensors in one checkpoint [count]."""

MAX_SHARDS = 10_000
"""Most weight files in one checkpoint [count]."""

MAX_TENSOR_RANK = 8
"""Most axes of one tensor [count]."""

MAX_YAML_BYTES = 1_000_000
"""Largest recipe or hand-edited plan [bytes]."""

MAX_CALIBRATION_BYTES = 256 * 1024 * 1024
"""Largest calibration file that is read [bytes]."""

MIN_CALIBRATION_TOKENS = 2048
"""Fewest tokens that statistics are collected from [tokens]; fewer gave perplexities in the thousands elsewhere."""

MIN_COMPARISON_TOKENS = 512
"""Fewest tokens that whole plans are compared on [tokens]; below, a hundredth of divergence is luck."""

MAX_LAYERS = 4096
"""Deepest model [transformer blocks]."""

MAX_DIMENSION = 1 << 24
"""Largest single dimension of a model config (hidden size, vocabulary) [count]."""

WORKER_TIMEOUT_S = 1800
"""Longest single measurement before its worker is killed [seconds]."""

MAX_WORKER_OUTPUT_BYTES = 16 * 1024 * 1024
"""Most output taken from a measurement worker [bytes]."""

BASELINE_TIMEOUT_S = 3600
"""Longest run of another tool that builds a baseline [seconds]."""

MAX_TOOL_OUTPUT_BYTES = 64 * 1024 * 1024
"""Most output taken from another tool [bytes]; model builders log every node."""

MAX_HIDDEN_BYTES = 512 * 1024 * 1024
"""Hidden states between two transformer blocks that are kept in memory [bytes]; the rest goes to a temporary file."""

SHARD_BYTES = 256 * 1024 * 1024
"""Tensors that are gathered before a weight file is written [bytes]; a larger tensor gets a file of its own."""
