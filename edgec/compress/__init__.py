"""Applying a plan: torch modules for the factors, and the Compressed folder on disk."""
