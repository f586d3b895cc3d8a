"""Quality, against the dense model and on held-out text: embeddings for encoders, KL and perplexity for causal LMs."""
