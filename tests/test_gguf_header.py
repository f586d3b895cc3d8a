"""Hostile and broken GGUF files (rows 11 to 15 of the fault list), and what a sound one gives."""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_for_tests import ARRAY, BOOL, F32, F64, I64, STRING, U8, U32, U64, array, gguf, info, pair, text
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec import limits
from edgec.errors import CheckpointError
from edgec.gguf_header import BLOCKS, is_gguf, read_header, tensor_bytes

ARCH = pair("general.architecture", STRING, "llama")


def write(folder: Path, raw: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(raw)
    return path


def refused(path: Path, match: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(CheckpointError, match=match) as caught:
        read_header(path)
    assert time.perf_counter() - begun < 1.0
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


# What a sound file gives


def test_what_gguf_py_writes_comes_back(tmp_path: Path) -> None:
    gguf_py = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf_py.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0])
    odd = np.arange(6, dtype=np.float32).reshape(2, 3)
    packed = gguf_py.quants.quantize(
        np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64), gguf_py.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("odd.weight", odd)
    writer.add_tensor("half.weight", np.ones((4, 32), np.float16))
    writer.add_tensor("packed.weight", packed, raw_dtype=gguf_py.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_header(path)
    assert (found.architecture, found.version, found.alignment) == ("llama", 3, 32)
    assert found.integer("llama.block_count") == 2
    assert found.number("llama.rope.freq_base") == 10000.0
    assert found.flag("tokenizer.ggml.add_bos_token") is True
    assert found.strings("tokenizer.ggml.tokens") == ["a", "ü", ""]
    assert found.numbers("tokenizer.ggml.scores").tolist() == [0.5, -1.0, 2.0]
    told = {n: (t.shape, t.type_name, t.nbytes) for n, t in found.tensors.items()}
    assert told == {
        "odd.weight": ((2, 3), "F32", 24),
        "half.weight": ((4, 32), "F16", 256),
        "packed.weight": ((2, 64), "Q8_0", 136),
    }
    np.testing.assert_array_equal(tensor_bytes(found, "odd.weight").view(np.float32).reshape(2, 3), odd)
    np.testing.assert_array_equal(tensor_bytes(found, "packed.weight").reshape(2, 68), packed)


def test_the_table_of_types_is_ggmls() -> None:
    constants = pytest.importorskip("gguf").constants
    for number, (name, block, stored) in BLOCKS.items():
        kind = constants.GGMLQuantizationType(number)
        assert (kind.name, *constants.GGML_QUANT_SIZES[kind]) == (name, block, stored)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_alignment_is_kept(tmp_path: Path, version: int, alignment: int) -> None:
    pairs = [ARCH, pair("general.alignment", U32, alignment)]
    infos = [info("a", [3]), info("b", [2, 2], offset=alignment)]
    data = struct.pack("<3f", 1, 2, 3).ljust(alignment, b"\0") + struct.pack("<4f", 4, 5, 6, 7)
    found = read_header(write(tmp_path, gguf(pairs, infos, data, version=version, alignment=alignment)))
    assert found.data_start % alignment == 0
    assert tensor_bytes(found, "b").view(np.float32).tolist() == [4, 5, 6, 7]


def test_a_file_without_tensors_is_a_vocabulary(tmp_path: Path) -> None:
    assert read_header(write(tmp_path, gguf([ARCH]))).tensors == {}


def test_what_a_gguf_is(tmp_path: Path) -> None:
    assert is_gguf(write(tmp_path, gguf([ARCH])))
    assert not is_gguf(tmp_path)
    assert not is_gguf(tmp_path / "nothing")
    (tmp_path / "text").write_text("GGU")
    assert not is_gguf(tmp_path / "text")
    os.mkfifo(tmp_path / "pipe")
    assert not is_gguf(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")


def test_metadata_of_another_kind_are_named(tmp_path: Path) -> None:
    pairs = [ARCH, pair("n", STRING, "7"), pair("f", F64, float("nan")), pair("big", U64, 1 << 60), pair("b", BOOL, 1)]
    found = read_header(write(tmp_path, gguf(pairs)))
    for read, key in ((found.integer, "n"), (found.number, "f"), (found.integer, "big"), (found.integer, "b")):
        with pytest.raises(CheckpointError, match=f"metadata '{key}': expected a"):
            read(key)
    with pytest.raises(CheckpointError, match="the metadata lack 'm'"):
        found.text("m")
    assert found.text("m", "x") == "x"
    for ask in (found.strings, found.numbers, found.flag, found.text):
        with pytest.raises(CheckpointError, match="metadata 'big': expected"):
            ask("big")


# Hostile ones

ROOM = bytes(1 << 12)
LIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not a GGUF"),
    "only a magic": (b"GGUF", "not a GGUF"),
    "another format": (b"GGML" + bytes(60), "not a GGUF"),
    "version 1": (gguf(version=1), "version 1"),
    "version 4": (gguf(version=4), "version 4"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "2^30 elements in few bytes": (gguf([array("k", U8, [], 1 << 30)]), "announces 1073741824 values in 'k'"),
    "2^30 strings in few bytes": (gguf([array("k", STRING, [], 1 << 30)]), "announces 1073741824 strings in 'k'"),
    "2^64 - 1 elements": (gguf([array("k", U64, [], (1 << 64) - 1)]), "announces 18446744073709551615 values"),
    "2^60 tensors": (gguf(tensors=1 << 60), "announces 1152921504606846976 tensors"),
    "2^60 pairs": (gguf(metadata=1 << 60), "announces 1152921504606846976 metadata pairs"),
    "an array of arrays": (
        gguf([text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + struct.pack("<IQ", U8, 0)]),
        "array of arrays",
    ),
    "a long string": (gguf([text("k") + struct.pack("<I", STRING) + text("x", 1 << 62)]), "claims 4611686018427387904"),
    "a string past the end": (gguf([text("k") + struct.pack("<I", STRING) + text("x", 999)]), "truncated"),
    "a long key": (gguf([pair("k" * 70_000, U8, 1)]), "claims 70000 bytes"),
    "an empty key": (gguf([pair("", U8, 1)]), "key is empty"),
    "a key twice": (gguf([pair("k", U8, 1), pair("k", U8, 1)]), "'k' appears twice"),
    "a key that is not UTF-8": (gguf([pair(b"\xff\xfe", U8, 1)]), "not UTF-8"),
    "a value that is not UTF-8": (gguf([pair("k", STRING, b"a\xc3")]), "not UTF-8"),
    "an unknown type": (gguf([text("k") + struct.pack("<IQ", 77, 0)]), "unknown type 77"),
    "an array of an unknown type": (gguf([text("k") + struct.pack("<IIQ", ARRAY, 99, 1)]), "unknown type 99"),
    "a bool of 7": (gguf([pair("k", BOOL, 7)]), "neither 0 nor 1"),
    "alignment 0": (gguf([pair("general.alignment", U32, 0)]), "expected a power of two"),
    "alignment 24": (gguf([pair("general.alignment", U32, 24)]), "expected a power of two"),
    "alignment in words": (gguf([pair("general.alignment", STRING, "32")]), "expected a power of two"),
    "alignment 2^31": (gguf([pair("general.alignment", U32, 1 << 31)], [info("a", [2])], ROOM), "truncated or damaged"),
    "no name": (gguf([], [info("", [2])], ROOM), "has no name"),
    "a long name": (gguf([], [info("n" * 64, [2])], ROOM), "claims 64 bytes"),
    "a tensor twice": (gguf([], [info("a", [8]), info("a", [8], offset=32)], ROOM), "'a' is defined twice"),
    "no axes": (gguf([], [info("a", [])], ROOM), "0 axes"),
    "five axes": (gguf([], [info("a", [1] * 5)], ROOM), "5 axes"),
    "2^32 - 1 axes": (gguf([], [info("a", [1], axes=(1 << 32) - 1)], ROOM), "4294967295 axes"),
    "a zero axis": (gguf([], [info("a", [0, 4])], ROOM), r"shape \[4, 0\]"),
    "a product that wraps to 0": (gguf([], [info("a", [1 << 32, 1 << 32])], ROOM), "shape"),
    "a product that wraps to 16": (gguf([], [info("a", [(1 << 60) + 1, 16])], ROOM), "shape"),
    "bytes that wrap": (gguf([], [info("a", [1 << 62])], ROOM), "shape"),
    "a removed type": (gguf([], [info("a", [32], kind=4)], ROOM), "unknown type 4"),
    "a type nobody has": (gguf([], [info("a", [32], kind=1 << 31)], ROOM), "unknown type 2147483648"),
    "half a block": (gguf([], [info("a", [48, 2], kind=8)], ROOM), "rows of 48 do not divide into Q8_0 blocks of 32"),
    "overlap": (gguf([], [info("a", [8]), info("b", [8], offset=0)], ROOM), "gap or overlap"),
    "a gap": (gguf([], [info("a", [8]), info("b", [8], offset=64)], ROOM), "gap or overlap"),
    "a crooked offset": (gguf([], [info("a", [9]), info("b", [8], offset=36)], ROOM), "gap or overlap"),
    "an offset of 2^64 - 32": (gguf([], [info("a", [8], offset=(1 << 64) - 32)], ROOM), "gap or overlap"),
    "truncated data": (gguf([], [info("a", [8])], bytes(31)), "truncated or damaged"),
    "infos missing": (gguf([], [info("a", [8])], ROOM, tensors=2), "no name|truncated|axes"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused(tmp_path: Path, lie: str) -> None:
    raw, message = LIES[lie]
    refused(write(tmp_path, raw), message)


def test_strings_and_bytes_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_GGUF_STRINGS", 5)
    path = write(tmp_path, gguf([array("a", STRING, "xyz"), array("b", STRING, "xyz")]))
    refused(path, r"more than 5 strings in the metadata \(in 'b'\)")
    monkeypatch.setattr(limits, "MAX_GGUF_STRINGS", 6)
    assert read_header(path).strings("b") == ["x", "y", "z"]
    monkeypatch.setattr(limits, "MAX_GGUF_HEADER_BYTES", 60)
    refused(path, "more than 60 bytes of metadata")
    monkeypatch.setattr(limits, "MAX_TENSORS", 1)
    monkeypatch.setattr(limits, "MAX_GGUF_HEADER_BYTES", 1 << 20)
    refused(write(tmp_path, gguf([], [info("a", [8]), info("b", [8], offset=32)], ROOM)), "2 tensors, at most 1")


def test_every_cut_is_refused(tmp_path: Path) -> None:
    pairs = [ARCH, array("t", STRING, ["a", "b"]), array("s", F32, [1.0, 2.0])]
    whole = gguf(pairs, [info("a", [8]), info("b", [8], offset=32)], bytes(64))
    assert len(read_header(write(tmp_path, whole)).tensors) == 2
    for end in range(len(whole)):
        with pytest.raises(CheckpointError):
            read_header(write(tmp_path, whole[:end]))


def test_memory_and_time_stay_small(tmp_path: Path) -> None:
    """A file of 100 MB of empty strings that announces as many as it could hold, under 600 MB of address space."""
    count = (100 << 20) // 8 - 100
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(gguf([array("k", STRING, [], count)]).rstrip(b"\0"))
        file.truncate(100 << 20)
    code = "import sys; from edgec.gguf_header import read_header; read_header(sys.argv[1])"

    def capped() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))

    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, preexec_fn=capped, env=environment, check=False
    )
    assert done.returncode == 1
    assert b"CheckpointError" in done.stderr
    assert b"strings in the metadata" in done.stderr
    assert b"MemoryError" not in done.stderr


SOUND = gguf(
    [ARCH, array("t", STRING, ["ab", "c"]), array("s", F32, [1.0]), pair("i", I64, -5)],
    [info("a", [32, 2], kind=8), info("b", [8], offset=96)],
    bytes(128),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_give_a_header_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    raw = bytearray(SOUND)
    for place, value in changes:
        raw[place] = value
    check_bounded(tmp_path_factory, bytes(raw))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 3), st.integers(0, 3))
def test_garbage_after_a_sound_start(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes, tensors: int, pairs: int
) -> None:
    check_bounded(tmp_path_factory, b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + tail)


def check_bounded(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = write(tmp_path_factory.getbasetemp(), raw)
    try:
        found = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    ends = [found.data_start]
    for tensor in found.tensors.values():
        assert ends[-1] <= tensor.offset
        assert tensor.offset + tensor.nbytes <= len(raw)
        assert tensor_bytes(found, tensor.name).size == tensor.nbytes
        ends.append(tensor.offset + tensor.nbytes)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda k: k != "general.alignment"),
        st.one_of(
            st.integers(0, (1 << 64) - 1).map(lambda v: (U64, v)),
            st.floats(allow_nan=False).map(lambda v: (F64, v)),
            st.text(max_size=40).map(lambda v: (STRING, v)),
            st.booleans().map(lambda v: (BOOL, v)),
        ),
        max_size=8,
    )
)
def test_metadata_survive(tmp_path_factory: pytest.TempPathFactory, values: dict[str, tuple[int, Any]]) -> None:
    pairs = [pair(key, kind, value) for key, (kind, value) in values.items()]
    found = read_header(write(tmp_path_factory.getbasetemp(), gguf(pairs)))
    assert dict(found.metadata) == {key: value for key, (_, value) in values.items()}
