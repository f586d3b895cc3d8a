"""What a checkpoint's layers are like: spectra and entropies of weights, second moments of what flows through them."""
