"""Files: read back by edgec's strict reader; the same bytes twice; nothing announced that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgec.errors import ExportError
from edgec.export.gguf.floats import copy_in_floats, values_of
from edgec.export.gguf.writer import GgufTensor, file_type, tensor_of, write_gguf
from edgec.fit import fit
from edgec.gguf_header import read_header
from edgec.quantize.formats import LayerFormat
from edgec.quantize.ggml_formats import EXACT, TYPES
from edgec.records import Spec

pytest.importorskip("gguf", reason="needs the extra edgec[gguf]")

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.tokens": ["a", "b c", "é"],
    "tokenizer.ggml.scores": [0.0, -1.0, -2.0],
    "tokenizer.ggml.token_type": [1, 2, 3],
    "tokenizer.ggml.add_bos_token": True,
}
WEIGHT = np.random.default_rng(0).standard_normal((64, 256))


def tensors() -> list[GgufTensor]:
    cores = {
        fmt: fit(WEIGHT, Spec("dense"), LayerFormat.parse(fmt)).cores["weight"] for fmt in ("int4-b32", "q3_k", "fp16")
    }
    vector = np.arange(5, dtype=np.float32)
    return [tensor_of(f"{fmt}.weight", core) for fmt, core in cores.items()] + [tensor_of("norm.weight", vector)]


def test_a_file_is_read_back_as_it_was_meant(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    sizes = write_gguf(path, METADATA, tensors())
    header = read_header(path)
    told = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in header.metadata.items()}
    assert told == {**METADATA, "general.file_type": 2, "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5)}
    assert {name: (t.type_name, t.shape, t.nbytes) for name, t in header.tensors.items()} == {
        "int4-b32.weight": ("Q4_0", (64, 256), 64 * 256 * 18 // 32),
        "q3_k.weight": ("Q3_K", (64, 256), 64 * 110),
        "fp16.weight": ("F16", (64, 256), 2 * 64 * 256),
        "norm.weight": ("F32", (5,), 20),
    }
    assert sizes == {name: t.nbytes for name, t in header.tensors.items()}
    assert all(t.offset % 32 == 0 for t in header.tensors.values())
    for fmt in ("int4-b32", "q3_k", "fp16"):
        core: Any = fit(WEIGHT, Spec("dense"), LayerFormat.parse(fmt)).dense()
        np.testing.assert_array_equal(values_of(header, f"{fmt}.weight"), core)


@pytest.mark.parametrize(
    ("types", "number"),
    [(("F32",), 0), (("F16",), 1), (("Q4_0", "Q8_0", "Q8_0"), 2), (("Q4_K", "F32"), 15), (("IQ3_XXS",), 23), ((), 0)],
)
def test_a_file_says_what_it_mostly_holds(types: tuple[str, ...], number: int) -> None:
    """llama.cpp's numbers, by the weights of the matrices: the first type has the most; vectors do not count."""
    tensors = [GgufTensor(f"t{i}", (1024 >> 3 * i, 256), kind, dict) for i, kind in enumerate(types)]
    vector = GgufTensor("norm", (1 << 20,), "F32", dict)
    assert file_type([*tensors, vector]) == number


def test_every_type_that_a_plan_may_name_has_a_number() -> None:
    for kind in (*TYPES, *EXACT.values()):
        assert 0 <= file_type([GgufTensor("t", (1, 256), kind, dict)]) < 64


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_gguf(tmp_path / name, METADATA, tensors())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_copy_in_floats_has_the_same_numbers(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a", METADATA, tensors())
    copy_in_floats(tmp_path / "a", tmp_path / "b")
    first, second = read_header(tmp_path / "a"), read_header(tmp_path / "b")
    assert {t.type_name for t in second.tensors.values()} == {"F32"}
    for name in first.tensors:
        np.testing.assert_array_equal(values_of(first, name), values_of(second, name))
    assert list(first.metadata) == list(second.metadata)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (GgufTensor("w", (4, 32), "Q8_0", lambda: np.zeros((4, 33), np.uint8)), "132 bytes, announced 136"),
        (GgufTensor("w", (4, 40), "Q8_0", lambda: np.zeros((4, 34), np.uint8)), "do not divide"),
        (GgufTensor("w" * 64, (4,), "F32", lambda: np.zeros(4, np.float32)), "at most 63 bytes"),
        (GgufTensor("w", (4,), "Q9_9", lambda: np.zeros(4, np.float32)), "no type 'Q9_9'"),
    ],
)
def test_what_does_not_fit_is_refused(tensor: GgufTensor, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=reason):
        write_gguf(tmp_path / "model.gguf", METADATA, [tensor])


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = [tensor_of("w", np.zeros(4, np.float32))] * 2
    with pytest.raises(ExportError, match="must differ"):
        write_gguf(tmp_path / "model.gguf", METADATA, twice)
