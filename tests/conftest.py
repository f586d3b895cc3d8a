"""Hypothesis searches the same examples on every run: a red build must be red again when it is looked into."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("edgec", derandomize=True, database=None)
settings.load_profile("edgec")
