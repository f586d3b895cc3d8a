"""Quality, always against the dense model and always on held-out text: embeddings for encoders, KL and perplexity for causal LMs."""
