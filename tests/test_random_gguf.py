"""GGUF files with random blocks: what a real export of the shape would be, in everything but the numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgec import pipeline, random_gguf
from edgec.bench import shapes
from edgec.checkpoint import open_checkpoint
from edgec.errors import UsageError
from edgec.gguf_header import read_header
from edgec.heal.settings import HealSettings
from edgec.runtime import open_artifact

pytest.importorskip("llama_cpp", reason="needs the extra edgec[gguf]")

MIXED = shapes.Shape("mixed", 4, 512, 768, 8, 2, 64, 640, 512)
"""Wide enough for K types, and twice as wide as its twin."""


def layout(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (t.shape, t.type_name) for name, t in read_header(path).tensors.items()}


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_random_blocks_spread_like_the_weights_of_a_shape(kind: str) -> None:
    from gguf import GGMLQuantizationType, dequantize

    raw = random_gguf.random_blocks("blk.0.attn_q.weight", (256, 1024), kind)
    values = dequantize(raw, GGMLQuantizationType[kind])
    assert values.shape == (256, 1024)
    assert values.std() == pytest.approx(0.02, rel=0.05)
    assert abs(values.mean()) < 0.0025  # codes run from -8 to 7
    assert np.array_equal(raw, random_gguf.random_blocks("blk.0.attn_q.weight", (256, 1024), kind))
    assert not np.array_equal(raw, random_gguf.random_blocks("blk.1.attn_q.weight", (256, 1024), kind))


def test_a_factored_file_is_laid_out_as_the_export_does_it_and_runs(tmp_path: Path) -> None:
    model = shapes.write("llama-tiny", tmp_path / "model")
    request = pipeline.ExportRequest(
        model, "gguf-factored", tmp_path / "real", plan="uniform:0.5", plain=True, quality=False,
        heal=HealSettings(mode="off"),
    )  # fmt: skip
    pipeline.export(request)
    made = random_gguf.write_factored(model, "uniform:0.5", tmp_path / "random")
    name = "model.factored.gguf"
    assert layout(made / name) == layout(tmp_path / "real" / name)
    assert read_header(made / name).metadata.keys() == read_header(tmp_path / "real" / name).metadata.keys()
    loaded = open_artifact(made)
    assert loaded.task == "causal-lm"
    assert np.isfinite(loaded.logits(np.arange(8)[None])).all()  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"--plan dense:fp16: .* would hold fp16"):
        random_gguf.write_factored(model, "dense:fp16", tmp_path / "floats")
    assert not (tmp_path / "floats").exists()


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q4_0"])
def test_dense_types_are_those_that_llama_cpp_chooses(kind: str, tmp_path: Path) -> None:
    from edgec.bench.baselines import _llama_quantize
    from edgec.export.gguf.plain import write_plain

    model = shapes.write(MIXED, tmp_path / "model")
    made = random_gguf.write_quantised(MIXED, model, kind, tmp_path / "random")
    plain = write_plain(open_checkpoint(model), tmp_path / "plain")
    _llama_quantize.quantise(plain / "model.gguf", tmp_path / "real.gguf", kind)
    assert layout(made / "model.gguf") == layout(tmp_path / "real.gguf")
    assert len({t for _, t in layout(made / "model.gguf").values()}) > 2  # F32 and two quantised types
