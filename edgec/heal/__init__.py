"""Distillation from the dense model into a compressed one: factors, scales, biases and norms learn what was lost."""
