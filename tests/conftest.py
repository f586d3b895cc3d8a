"""Checkpoints that many tests read, made once. Hypothesis searches the same examples on every run, so that a red build
is red again when it is looked into.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from models_for_tests import write_causal_lm, write_encoder, write_text

settings.register_profile("edgec", derandomize=True, database=None)
settings.load_profile("edgec")


@pytest.fixture(scope="session", autouse=True)
def less_text_to_compare_plans_on() -> Iterator[None]:
    """A search measures some twenty plans; on a tiny model that is most of an export, and a quarter of the text finds
    the same ones. `runtime_tests/` runs with what ships.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgec.workspace.SEARCH_TOKENS", 2048)
        yield


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


@pytest.fixture(scope="session")
def lm_artifact(lm_source: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama at half its parameters and int4, exported for x64."""
    return _exported(lm_source, text_file, tmp_path_factory.mktemp("lm-artifact") / "lm-half")


@pytest.fixture(scope="session")
def encoder_artifact(encoder_source: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT, likewise."""
    return _exported(encoder_source, text_file, tmp_path_factory.mktemp("encoder-artifact") / "encoder-half")


def _exported(source: Path, text: Path, out: Path) -> Path:
    from edgec import pipeline

    return pipeline.export(pipeline.ExportRequest(source, "onnx-x64", out, plan="uniform:0.5", calibration=text)).out
