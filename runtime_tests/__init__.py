"""Parity, loadability and memory of exported artifacts on the runtimes that load them."""
