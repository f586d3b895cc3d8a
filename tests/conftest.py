"""Checkpoints that many tests read, made once. Hypothesis searches the same examples on every run, so that a red build
is red again when it is looked into.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from models_for_tests import write_causal_lm, write_encoder, write_text

settings.register_profile("edgec", derandomize=True, database=None)
settings.load_profile("edgec")


@pytest.fixture(scope="session")
def encoder_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with its tokenizer; read-only, as every session fixture."""
    return write_encoder(tmp_path_factory.mktemp("encoder-source") / "tiny-bert")


@pytest.fixture(scope="session")
def lm_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tied head and its tokenizer."""
    return write_causal_lm(tmp_path_factory.mktemp("lm-source") / "tiny-llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text, short enough to be quick."""
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")
