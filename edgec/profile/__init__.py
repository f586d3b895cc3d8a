"""What a checkpoint's layers are like: spectra and entropies of the weights, second moments of what flows through them."""
