"""Speed, memory and parity of edgec's ggml runtime against llama.cpp."""
