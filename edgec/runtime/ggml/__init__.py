"""Runs GGUF files whose layers are factored, on ggml's own kernels (see docs/gguf-factored.md)."""
