"""Hostile and broken checkpoint folders (rows 1 to 10 and 35 of the fault list), and what a sound one gives."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from edgec import limits
from edgec.checkpoint import open_checkpoint, parse_json, read_json, read_safetensors_header
from edgec.errors import CheckpointError, NumericsError

CONFIG = {"model_type": "bert", "architectures": ["BertModel"]}
Array = np.ndarray[Any, Any]


def folder_of(path: Path, tensors: dict[str, Array] | None = None, config: Any = CONFIG) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(tensors or {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, path / "model.safetensors")
    return path


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "U8", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop], **more}


def refused(folder: Path, match: str) -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sharded(folder: Path, weight_map: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


# What a sound folder gives


def test_tensors_come_back_as_they_were_written(tmp_path: Path) -> None:
    tensors = {
        "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
        "f16": np.arange(4, dtype=np.float16),
        "bf16": np.arange(4).astype(ml_dtypes.bfloat16),
        "i64": np.arange(3),
        "scalar": np.array(7, np.float32),
        "empty": np.empty((0, 5), np.float32),
    }
    found = open_checkpoint(folder_of(tmp_path, tensors))
    assert set(found.tensors) == set(tensors)
    for name, expected in tensors.items():
        values = found.read(name)
        assert values.dtype == expected.dtype
        np.testing.assert_array_equal(values, expected)
    assert found.parameters == 6 + 4 + 4 + 1
    assert (found.model_type, found.architecture) == ("bert", "BertModel")
    with pytest.raises((ValueError, RuntimeError)):
        found.read("f32")[0, 0] = 1


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": np.ones(3, np.float32)}, folder / "one.safetensors")
    save_file({"b": np.ones(4, np.float32)}, folder / "two.safetensors")
    assert open_checkpoint(folder).parameters == 7


def test_a_single_file_wins_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {"a": "one.safetensors"})
    save_file({"a": np.ones(3, np.float32)}, folder / "one.safetensors")
    save_file({"a": np.ones(5, np.float32)}, folder / "model.safetensors")
    assert open_checkpoint(folder).parameters == 5


def test_fingerprint_is_stable_and_sensitive(tmp_path: Path) -> None:
    base = {"a": np.arange(6, dtype=np.float32), "b": np.ones(2, np.float16)}
    first = open_checkpoint(folder_of(tmp_path / "1", base)).fingerprint
    assert first.startswith("sha256:")
    assert len(first) == 71
    assert open_checkpoint(folder_of(tmp_path / "2", dict(reversed(base.items())))).fingerprint == first
    changed = base["a"].copy()
    changed.view(np.uint8)[-1] ^= 1
    others = {
        "a byte": folder_of(tmp_path / "3", {**base, "a": changed}),
        "a shape": folder_of(tmp_path / "4", {**base, "a": base["a"].reshape(2, 3)}),
        "a name": folder_of(tmp_path / "5", {"c": base["a"], "b": base["b"]}),
        "a dtype": folder_of(tmp_path / "6", {**base, "a": base["a"].view(np.int32)}),
        "the config": folder_of(tmp_path / "7", base, {**CONFIG, "hidden_size": 3}),
    }
    prints = {why: open_checkpoint(folder).fingerprint for why, folder in others.items()}
    assert len({first, *prints.values()}) == 6, prints


def test_fingerprint_does_not_depend_on_how_tensors_are_split(tmp_path: Path) -> None:
    a, b = np.ones(3, np.float32), np.ones(4, np.float32)
    folder = sharded(tmp_path / "m", {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": a}, folder / "one.safetensors")
    save_file({"b": b}, folder / "two.safetensors")
    whole = folder_of(tmp_path / "whole", {"a": a, "b": b})
    assert open_checkpoint(folder).fingerprint == open_checkpoint(whole).fingerprint


# 1, 2: names and links


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", "", ".", ".."])
def test_shard_names_that_are_paths_are_refused(name: str, tmp_path: Path) -> None:
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "evil.safetensors")
    refused(sharded(tmp_path / "m", {"a": name}), "not a plain file name")


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "elsewhere.safetensors")
    folder = folder_of(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    refused(folder, "links out of the folder")


def test_a_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"a": np.ones(3, np.float32)}, blobs / "1234")
    (blobs / "5678").write_text(json.dumps(CONFIG))
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    (snapshot / "config.json").symlink_to("../../blobs/5678")
    assert open_checkpoint(snapshot).parameters == 3
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../elsewhere")
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "elsewhere")
    refused(snapshot, "links out of the folder")


def test_pipes_devices_and_circles_are_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {"a": "one.safetensors"})
    os.mkfifo(folder / "one.safetensors")
    refused(folder, "not a regular file")
    (folder / "one.safetensors").unlink()
    (folder / "one.safetensors").symlink_to("one.safetensors")
    refused(folder, "circle|not a regular file")
    (folder / "one.safetensors").unlink()
    (folder / "one.safetensors").symlink_to("/dev/zero")
    refused(folder, "links out")
    (folder / "one.safetensors").unlink()
    (folder / "one.safetensors").mkdir()
    refused(folder, "not a regular file")


# 4: pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "consolidated.00.pth", "x.ckpt"])
def test_only_pickles_are_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert "safe_serialization" in refused(folder, "only pickled weights")


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder")
    (tmp_path / "m").mkdir()
    refused(tmp_path / "m", "no config.json")
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG))
    refused(tmp_path / "m", "no model.safetensors")
    refused(folder_of(tmp_path / "a", config={"architectures": ["BertModel"]}), "no model_type")
    for names in (None, [], "BertModel", [3]):
        refused(folder_of(tmp_path / "b", config={"model_type": "bert", "architectures": names}), "no architectures")
    refused(folder_of(tmp_path / "c", config=[]), "no model_type")


# 5: JSON


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"model_type": "bert", "model_type": "gpt2"}', "'model_type' appears twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -Infinity}', "Infinity is not JSON"),
        ("{" * 10, "not JSON"),
        ("", "not JSON"),
        ('{"a": "\\ud800', "not JSON"),
        ('{"a": ' + "1" * 5000 + "}", "not JSON"),
        ('{"a": -1e999}', "the number -1e999 is too large"),
        ("[" * 200_000, "nested deeper"),
        ('{"a":' * 200_000 + "1" + "}" * 200_000, "nested deeper"),
        ("]" * 1000 + "[" * 1000, "not JSON"),
    ],
    ids=range(11),
)
def test_json_that_is_hostile_or_broken(text: str, match: str, tmp_path: Path) -> None:
    refused(folder_of(tmp_path, config=text), match)


def test_brackets_inside_strings_do_not_nest() -> None:
    text = json.dumps({"template": "[{" * 1000 + '\\" \\\\ [', "x": ['"[[[[']})
    assert parse_json(text, "here") == json.loads(text)


def test_a_string_without_an_end_is_found_quickly() -> None:
    """Where every escaped quote of it could begin another string, a scan that tries them all takes hours."""
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="begins at character 6 has no end"):
        parse_json('{"a": "' + '\\"' * 500_000, "here")
    assert time.perf_counter() - start < 5


def test_a_late_duplicate_is_found_quickly() -> None:
    keys = ",".join(f'"k{i}":0' for i in range(200_000))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="'k7' appears twice"):
        parse_json("{" + keys + ',"k7":1}', "here")
    assert time.perf_counter() - start < 5


def test_json_beyond_the_cap_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    with path.open("wb") as file:
        file.truncate(limits.MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="at most"):
        read_json(path)


def test_a_device_that_never_ends_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_JSON_BYTES", 1000)
    with pytest.raises(CheckpointError, match="at most 1000"):
        read_json(Path("/dev/zero"))


def test_json_that_is_not_utf8_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match="not UTF-8"):
        read_json(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path / "y.json")


# 6: the index and the shards contradict one another


@pytest.mark.parametrize("body", [[], {}, {"weight_map": []}, {"weight_map": {"a": 3}}, "x", None])
def test_an_index_without_a_map_is_refused(body: Any, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {})
    (folder / "model.safetensors.index.json").write_text(json.dumps(body))
    refused(folder, "no weight_map")


def test_tensors_missing_or_defined_twice_are_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {"a": "one.safetensors", "b": "two.safetensors", "z": "two.safetensors"})
    save_file({"a": np.ones(3, np.float32)}, folder / "one.safetensors")
    refused(folder, "two.safetensors: missing")
    save_file({"b": np.ones(3, np.float32)}, folder / "two.safetensors")
    refused(folder, "1 tensors are in no shard, first 'z'")
    save_file({n: np.ones(3, np.float32) for n in "abz"}, folder / "two.safetensors")
    refused(folder, "two.safetensors: tensor 'a' is already defined in one.safetensors")


# 7, 8, 9: the safetensors header

SOUND = {"a": entry(0, 4), "b": entry(4, 6)}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "too short"),
        (b"\x01\x02", "too short"),
        (raw({}, length=1 << 62), "header claims"),
        (raw({}, length=3), "header claims"),
        (struct.pack("<Q", 1 << 30) + b"{}", "header claims"),
        (raw(SOUND, bytes(5)), "of the 5 in the file"),
        (raw(SOUND, bytes(7)), "1 bytes after the last tensor"),
        (raw({"a": entry(0, 4), "b": entry(3, 5)}, bytes(5)), "gap or overlap"),
        (raw({"a": entry(0, 4), "b": entry(5, 7)}, bytes(7)), "gap or overlap"),
        (raw({"a": entry(1, 4)}, bytes(4)), "gap or overlap"),
        (raw({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)), "gap or overlap"),
        (raw({"a": entry(-4, 0)}, bytes(4)), "offsets -4–0"),
        (raw({"a": entry(4, 0, [4])}, bytes(4)), "offsets 4–0"),
        (raw({"a": entry(0, 1 << 70)}, bytes(4)), "has shape|needs"),
        (raw({"a": entry(0, 4, [1 << 32, 1 << 32])}, bytes(4)), "has shape"),
        (raw({"a": entry(0, 0, [0, 1 << 60])}), "has shape"),
        (raw({"a": entry(0, 4, [2])}, bytes(4)), "needs 2 bytes"),
        (raw({"a": entry(0, 4, [-2, -2])}, bytes(4)), "has shape"),
        (raw({"a": entry(0, 4, [2.0, 2])}, bytes(4)), "has shape"),  # type: ignore[list-item]
        (raw({"a": entry(0, 1, [1] * 9)}, bytes(1)), "has shape"),
        (raw({"a": entry(0, 4, dtype="F4")}, bytes(4)), "dtype 'F4'; known: F64"),
        (raw({"a": entry(0, 4, more=1)}, bytes(4)), "something else"),
        (raw({"a": {"dtype": "U8", "shape": [4]}}, bytes(4)), "lacks"),
        (raw({"a": [1, 2]}, bytes(4)), "lacks"),
        (raw({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 4]}}, bytes(4)), "lacks"),
        (raw([]), "not an object"),
        (raw(b"\xff\xfe"), "not UTF-8"),
        (raw(b"{"), "not JSON"),
        (
            raw(b'{"a":' + json.dumps(entry(0, 4)).encode() + b',"a":' + json.dumps(entry(0, 4)).encode() + b"}"),
            "twice",
        ),
        (raw(b"[" * 200_000), "nested deeper"),
    ],
    ids=range(30),
)
def test_a_header_is_checked_against_the_bytes(content: bytes, match: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refused(folder, match)


def test_hostile_tensor_names_stay_names(tmp_path: Path) -> None:
    names = ["../../evil", "/etc/passwd", "<script>alert(1)</script>", "a\nb", "\x1b[31m", "__proto__", "a" * 10_000]
    header = {name: entry(i, i + 1) for i, name in enumerate(names)}
    folder = folder_of(tmp_path)
    (folder / "model.safetensors").write_bytes(raw({"__metadata__": {"format": "pt"}, **header}, bytes(len(names))))
    found = open_checkpoint(folder)
    assert set(found.tensors) == set(names)
    assert found.read("../../evil").tolist() == [0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_of_a_header_is_survived(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Either the same table of contents, a different sound one, or one CheckpointError; nothing else."""
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    content = bytearray(raw({"a": entry(0, 16, [2, 2], "F32"), "b": entry(16, 20)}, bytes(20)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 21))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        infos = read_safetensors_header(path)
    except CheckpointError:
        return
    assert sum(i.stop - i.start for i in infos.values()) == 20


# 35: numbers


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("bad", "kind"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf")])
def test_weights_that_are_not_finite_are_named(dtype: Any, bad: float, kind: str, tmp_path: Path) -> None:
    values = np.ones((3, 4)).astype(dtype)
    values[2, 3] = bad
    found = open_checkpoint(folder_of(tmp_path, {"fine": np.ones(2, np.float32), "block.1.weight": values}))
    with pytest.raises(NumericsError, match=rf"'block.1.weight' holds {kind}"):
        found.check_finite()


def test_finite_weights_pass_and_are_all_looked_at(tmp_path: Path) -> None:
    tensors = {
        "a": np.full(2, 1e300),
        "b": np.ones(3, np.int64),
        "c": np.empty((0, 2), np.float32),
        "d": np.array([True]),
    }
    seen: list[str] = []
    open_checkpoint(folder_of(tmp_path, tensors)).check_finite(seen.append)
    assert seen == ["a", "b", "c", "d"]


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    found = open_checkpoint(folder_of(tmp_path, {"a": np.ones(1000, np.float32)}))
    os.truncate(tmp_path / "model.safetensors", 200)
    with pytest.raises(CheckpointError, match="ends early"):
        _ = found.fingerprint
