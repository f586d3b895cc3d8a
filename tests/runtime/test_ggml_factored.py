"""Factored files, from a checkpoint and factors to logits: against torch on the same cores, and every lie refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

from edgec import decompose, modeling
from edgec.checkpoint import Checkpoint, open_checkpoint
from edgec.compress import store
from edgec.contraction import Contraction, Gather, MatMul, core_shapes
from edgec.errors import CheckpointError, RuntimeUnavailableError, VerificationError
from edgec.export.artifacts import gguf_factored as artifact
from edgec.export.gguf import factored
from edgec.export.gguf.floats import copy_in_floats
from edgec.export.gguf.writer import tensor_of, write_gguf
from edgec.export.targets import get_target
from edgec.fit import Factors, contraction_of, core_formats
from edgec.gguf_header import read_header
from edgec.modeling import Layer
from edgec.quantize import rtn
from edgec.quantize.formats import LayerFormat, storable
from edgec.records import Spec
from edgec.runtime import RuntimeOptions, find_loader, llama_cpp, open_artifact
from edgec.runtime.ggml import MODEL_FILE, library, tensors
from edgec.runtime.ggml.model import GgmlModel
from edgec.runtime.ggml.network import SECONDS, Network
from edgec.runtime.ggml.tensors import Device
from edgec.runtime.llama_cpp import Vocabulary

TARGET = get_target("gguf-factored")
ONE = RuntimeOptions(threads=1)
WIRING = 1e-5
"""Largest relative difference from torch where everything is F32: rounding in another order."""
GELU = 1e-3
"""The same where GELU gates: ggml reads it from a table in half precision."""
SHIPPED = 0.05
"""The same with activations rounded to 8 bits."""

Kinds = Callable[[Layer], tuple[Spec, str]]


def factors_of(contraction: Contraction, fmt: str, seed: int) -> Factors:
    """Random cores of a contraction, of a size that keeps what flows through them near one."""
    generator = np.random.default_rng(seed)
    formats = core_formats(contraction, LayerFormat.parse(fmt))
    cores: dict[str, Any] = {}
    for name, shape in core_shapes(contraction).items():
        spread = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
        core = (generator.standard_normal(shape) * spread).astype(np.float32)
        own = formats[name]
        cores[name] = rtn.quantize(core, own, None) if own.quantised else storable(core) if own.bits == 16 else core
    return Factors(contraction, cores)


def factor(checkpoint: Checkpoint, choose: Kinds) -> dict[str, Factors]:
    found = {}
    for seed, layer in enumerate(modeling.layers(modeling.without_memory(checkpoint))):
        spec, fmt = choose(layer)
        found[layer.name] = factors_of(contraction_of(spec, layer.shape, layer.role), fmt, seed)
    return found


def exported(checkpoint: Checkpoint, factors: Mapping[str, Factors], out: Path) -> Path:
    out.mkdir(parents=True)
    draft = artifact.prepare(checkpoint, modeling.task_of(checkpoint), out)
    written = artifact.write(draft, factors, TARGET, out, lambda done, total: None)
    assert written.model_bytes == (out / MODEL_FILE).stat().st_size
    return out


def torch_logits(checkpoint: Checkpoint, factors: Mapping[str, Factors], ids: NDArray[np.int64]) -> NDArray[Any]:
    model: Any = store.assemble(checkpoint, factors)
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(ids)[None]).logits[0].numpy())


def relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def wiring_error(folder: Path, ids: NDArray[np.int64], expected: NDArray[Any]) -> float:
    copy_in_floats(folder / MODEL_FILE, folder / "plain.gguf")
    exact = GgmlModel(folder / "plain.gguf", ONE, flash=False, cache="f32", selftest=False)
    return relative(exact.logits(ids), expected)


def ids_of(vocab: int, count: int = 24) -> NDArray[np.int64]:
    return np.random.default_rng(1).integers(0, vocab, count)


@pytest.mark.parametrize("kind", [k for k in decompose.kinds_of("linear") if k != "dense"])
def test_every_decomposition_runs_in_a_model(kind: str, lm_source: Path, tmp_path: Path) -> None:
    """Half of them have no core whose rows are the outputs: queries and keys must need no permuting."""
    checkpoint = open_checkpoint(lm_source)

    def choose(layer: Layer) -> tuple[Spec, str]:
        if layer.role == "embedding":
            return Spec("dense"), "int8-b32"
        found = decompose.get(kind)
        return (found.suggest(*layer.shape, 0.9, 32) or found.exact(*layer.shape))[0], "fp32"

    factors = factor(checkpoint, choose)
    folder = exported(checkpoint, factors, tmp_path / "out")
    ids = ids_of(320)
    assert wiring_error(folder, ids, torch_logits(checkpoint, factors, ids)) < WIRING


def write_family(folder: Path, name: str, changes: dict[str, Any]) -> None:
    """A small random model of a family."""
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        **changes,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)


def half(layer: Layer) -> tuple[Spec, str]:
    if layer.role == "embedding":
        return Spec("dense"), "int8-b32"
    return Spec("svd", ranks=(32,)), "int4-b32" if "mlp" in layer.name else "int8-b32"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Qwen2", {}),
        ("Qwen3", {"tie_word_embeddings": False}),
        ("Gemma2", {"query_pre_attn_scalar": 32, "sliding_window": 9}),
        ("Gemma3", {"query_pre_attn_scalar": 32, "sliding_window": 9}),
    ],
)
def test_every_family(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Quantised factors: exact where nothing is rounded, and near where activations are."""
    write_family(tmp_path / "source", name, changes)
    checkpoint = open_checkpoint(tmp_path / "source")
    factors = factor(checkpoint, half)
    folder = exported(checkpoint, factors, tmp_path / "out")
    ids = ids_of(160)
    expected = torch_logits(checkpoint, factors, ids)
    assert wiring_error(folder, ids, expected) < (GELU if name.startswith("Gemma") else WIRING)
    shipped = GgmlModel(folder, ONE)
    assert relative(shipped.logits(ids), expected) < SHIPPED
    eighth = GgmlModel(folder, ONE, cache="q8_0")
    assert relative(eighth.logits(ids), expected) < SHIPPED


@pytest.fixture(scope="module")
def small(lm_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, its block linears and head as pairs of quantised cores."""
    checkpoint = open_checkpoint(lm_source)
    return exported(checkpoint, factor(checkpoint, half), tmp_path_factory.mktemp("factored") / "out")


def test_a_factored_table_shares_a_core_with_its_head(lm_source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(lm_source)
    factors = factor(checkpoint, half)
    table = factors_of(Contraction(128, 320, (Gather("a", 320, 64), MatMul("b", 128, 64))), "int8-b32", 5)
    head = factors_of(Contraction(320, 128, (MatMul("b", 64, 128), MatMul("a", 320, 64))), "int8-b32", 6)
    factors["model.embed_tokens"] = table
    factors["lm_head"] = Factors(head.contraction, {**head.cores, "a": table.cores["a"]})
    folder = exported(checkpoint, factors, tmp_path / "out")
    stored = set(read_header(folder / MODEL_FILE).tensors)
    assert "token_embd.edgec.a" in stored and "output.edgec.b" in stored
    assert not stored & {"output.edgec.a", "token_embd.weight", "output.weight"}
    ids = ids_of(320)
    assert wiring_error(folder, ids, torch_logits(checkpoint, factors, ids)) < WIRING


def test_a_dense_head_beside_a_factored_table_gets_a_matrix_of_its_own(lm_source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(lm_source)
    factors = factor(checkpoint, half)
    factors["model.embed_tokens"] = factors_of(
        Contraction(128, 320, (Gather("a", 320, 64), MatMul("b", 128, 64))), "int8-b32", 5
    )
    del factors["lm_head"]
    folder = exported(checkpoint, factors, tmp_path / "out")
    assert read_header(folder / MODEL_FILE).tensors["output.weight"].type_name == "F16"
    assert GgmlModel(folder, ONE).logits(ids_of(320)).shape == (24, 320)


def test_a_table_and_head_that_are_one_matrix_are_stored_once(lm_source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(lm_source)
    factors = factor(checkpoint, half)
    shared = factors["model.embed_tokens"].cores["weight"]
    factors["lm_head"] = Factors(Contraction(320, 128, (MatMul("weight", 320, 128),)), {"weight": shared})
    folder = exported(checkpoint, factors, tmp_path / "out")
    assert "output.weight" not in read_header(folder / MODEL_FILE).tensors
    ids = ids_of(320)
    assert wiring_error(folder, ids, torch_logits(checkpoint, factors, ids)) < WIRING


def test_the_folder_opens_generates_and_speaks(small: Path, lm_source: Path) -> None:
    model: Any = open_artifact(small, ONE)
    assert isinstance(model, GgmlModel) and find_loader(small).prepare()["llama-cpp-python"]
    text = "hello, world"
    tokenizer = transformers.AutoTokenizer.from_pretrained(lm_source)
    assert model.encode(text) == tokenizer(text)["input_ids"]
    assert model.decode(model.encode(text)) == text
    pieces = list(model.generate(text, 6))
    assert [p.token for p in pieces] == list(model.forced(model.encode(text), 6))[: len(pieces)]
    assert "".join(p.text for p in pieces) == model.decode([p.token for p in pieces])


def test_llama_cpp_reads_the_vocabulary_and_nothing_else(small: Path) -> None:
    vocabulary = Vocabulary(small / MODEL_FILE)
    assert vocabulary.size == 320 and vocabulary.there


def test_equal_inputs_give_equal_bytes(lm_source: Path, small: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(lm_source)
    again = exported(checkpoint, factor(checkpoint, half), tmp_path / "out")
    assert (again / MODEL_FILE).read_bytes() == (small / MODEL_FILE).read_bytes()


def test_the_estimate_of_what_ships_beside_the_plan(lm_source: Path, small: Path) -> None:
    checkpoint = open_checkpoint(lm_source)
    factors = factor(checkpoint, half)
    draft = artifact.prepare(checkpoint, modeling.task_of(checkpoint), small)
    beside = artifact.other_bytes(draft, set(factors))
    real = (small / MODEL_FILE).stat().st_size - sum(f.stored_bytes for f in factors.values())
    assert 0 <= beside - real < 0.1 * real + 4096


def test_the_self_test_finds_damage(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    raw = bytearray((small / MODEL_FILE).read_bytes())
    place = read_header(small / MODEL_FILE).tensors["blk.1.ffn_down.edgec." + last_core(small)]
    rows = np.frombuffer(bytes(raw[place.offset : place.offset + place.nbytes]), np.uint8).reshape(place.shape[0], -1)
    raw[place.offset : place.offset + place.nbytes] = rows[::-1].tobytes()
    path.write_bytes(raw)
    with pytest.raises(VerificationError, match="standard deviations"):
        GgmlModel(path, ONE)
    GgmlModel(path, ONE, selftest=False)


def last_core(folder: Path) -> str:
    """The core whose rows are the outputs."""
    tensors = read_header(folder / MODEL_FILE).tensors
    return next(n.rpartition(".")[2] for n, t in tensors.items() if "ffn_down.edgec" in n and t.shape[0] == 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edgec.format": 2}, "edgec.format 2"),
        ({"edgec.rope.layout": "pairs"}, "'pairs'"),
        ({"edgec.programs": "{"}, "not sound JSON"),
        ({"edgec.programs": "{}"}, "attn_q.weight' is missing"),
        ({"edgec.programs": ('"blk.0.attn_q"', '"blk.9.attn_q"')}, "does not have"),
        ({"edgec.programs": ('"blk.0.attn_q"', '"blk.0.attn_k"')}, "twice"),
        ({"edgec.programs": ("blk.0.attn_q.edgec", "blk.0.nothing")}, "is missing"),
        ({"edgec.programs": ("blk.0.attn_q.edgec", "blk.0.ffn_down.edgec")}, "expected"),
        ({"edgec.selftest.tokens": [0, 1]}, "malformed"),
        ({"edgec.selftest.tokens": [320] * 64}, "malformed"),
        ({"edgec.selftest.ids": [-1]}, "outside the vocabulary"),
        ({"edgec.selftest.ids": [0.5]}, "malformed"),
        ({"edgec.selftest.logits": [float("nan")] * 64}, "standard deviations"),
    ],
)
def test_metadata_that_lie(change: dict[str, Any], message: str, lm_source: Path, small: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(lm_source)
    draft = artifact.prepare(checkpoint, modeling.task_of(checkpoint), tmp_path)
    metadata, tensors = factored.contents(draft, factor(checkpoint, half))
    for key, value in change.items():
        metadata[key] = str(metadata[key]).replace(*value) if isinstance(value, tuple) else value
    write_gguf(tmp_path / "lie.gguf", metadata, tensors)
    with pytest.raises((CheckpointError, VerificationError), match=message):
        GgmlModel(tmp_path / "lie.gguf", ONE)


def test_a_program_that_explodes_is_refused(lm_source: Path, tmp_path: Path) -> None:
    """Sound steps over a tiny core that would make 2 ** 27 numbers of every token before they shrink again."""
    steps: list[Any] = []
    for _ in range(4):
        width = 128 * 16 ** (len(steps) // 3)
        steps += [["reshape", [width, 1]], ["matmul", "a", 16, 1], ["reshape", [16 * width]]]
    steps += [["reshape", [1 << 13, 1 << 10, 1]], ["matmul", "a", 16, 1]]
    steps += [["reshape", [128, 1 << 20]], ["reduce_sum", 1]]
    checkpoint = open_checkpoint(lm_source)
    draft = artifact.prepare(checkpoint, modeling.task_of(checkpoint), tmp_path)
    metadata, tensors = factored.contents(draft, factor(checkpoint, half))
    programs = json.loads(str(metadata["edgec.programs"]))
    programs["blk.0.attn_q"] |= {"cores": {"a": "a"}, "steps": steps}
    metadata["edgec.programs"] = json.dumps(programs)
    write_gguf(tmp_path / "wide.gguf", metadata, [*tensors, tensor_of("a", np.ones((16, 1), np.float32))])
    with pytest.raises(CheckpointError, match="134217728 numbers of one token"):
        GgmlModel(tmp_path / "wide.gguf", ONE)


@pytest.mark.parametrize(
    ("layer", "steps", "message"),
    [
        ("blk.0.attn_q", [["matmul", "a", 1, 128], ["reduce_sum", 0], ["gather", "t", 128, 128]], "looks up numbers"),
        ("token_embd", [["gather", "table", 320, 128]], "a head of its own"),
    ],
)
def test_programs_that_would_end_the_process_are_refused(
    layer: str, steps: list[Any], message: str, lm_source: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(lm_source)
    draft = artifact.prepare(checkpoint, modeling.task_of(checkpoint), tmp_path)
    metadata, tensors = factored.contents(draft, factor(checkpoint, half))
    programs = json.loads(str(metadata["edgec.programs"]))
    programs[layer] = {"cores": {step[1]: step[1] for step in steps if isinstance(step[1], str)}, "steps": steps}
    programs[layer] |= {"in": 320, "out": 128} if layer == "token_embd" else {"in": 128, "out": 128}
    programs.pop("output", None)
    metadata["edgec.programs"] = json.dumps(programs)
    more = {"a": (1, 128), "t": (128, 128), "table": (320, 128)}
    added = [tensor_of(name, np.ones(shape, np.float32)) for name, shape in more.items()]
    kept = [t for t in tensors if not t.name.startswith("output.") or t.name == "output_norm.weight"]
    write_gguf(tmp_path / "lie.gguf", metadata, [*kept, *added])
    with pytest.raises(CheckpointError, match=message):
        GgmlModel(tmp_path / "lie.gguf", ONE)


def _rewritten(lm_source: Path, path: Path, layers: dict[str, Any], more: Mapping[str, tuple[int, int]]) -> Path:
    """A sound file with other programs for some layers, and more tensors, whose first ones lie side by side."""
    checkpoint = open_checkpoint(lm_source)
    draft = artifact.prepare(checkpoint, modeling.task_of(checkpoint), path.parent)
    metadata, tensors = factored.contents(draft, factor(checkpoint, half))
    programs = json.loads(str(metadata["edgec.programs"])) | layers
    metadata["edgec.programs"] = json.dumps(programs)
    write_gguf(path, metadata, [*tensors, *(tensor_of(n, np.ones(s, np.float32)) for n, s in more.items())])
    return path


def _low_rank(cores: Mapping[str, str], out: int, rank: int) -> dict[str, Any]:
    first, second = cores
    steps = [["matmul", first, rank, 128], ["matmul", second, out, rank]]
    return {"in": 128, "out": out, "cores": dict(cores), "steps": steps}


def test_a_tensor_with_the_name_of_a_bundle_is_refused(lm_source: Path, tmp_path: Path) -> None:
    """Its product would have read the three stacked cores in place of it, and ggml would have ended the process."""
    layers = {
        "blk.0.attn_q": _low_rank({"a": "qa", "b": "qb"}, 128, 32),
        "blk.0.attn_k": _low_rank({"a": "ka", "b": "kb"}, 64, 32),
        "blk.0.attn_v": _low_rank({"a": "va", "b": "vb"}, 64, 32),
        "blk.0.attn_output": _low_rank({"a": "blk.0.attn", "b": "ob"}, 128, 32),
    }
    more = dict.fromkeys(("qa", "ka", "va", "blk.0.attn"), (32, 128)) | {"qb": (128, 32), "ob": (128, 32)}
    more |= dict.fromkeys(("kb", "vb"), (64, 32))
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn' has a name that stands for several"):
        GgmlModel(_rewritten(lm_source, tmp_path / "taken.gguf", layers, more), ONE)


def test_a_core_that_is_used_twice_is_in_no_bundle(lm_source: Path, tmp_path: Path) -> None:
    steps = [["matmul", "a", 128, 128], ["matmul", "a", 128, 128]]
    layers = {
        "blk.0.attn_q": {"in": 128, "out": 128, "cores": {"a": "qa"}, "steps": steps},
        "blk.0.attn_k": _low_rank({"a": "ka", "b": "kb"}, 64, 32),
        "blk.0.attn_v": _low_rank({"a": "va", "b": "vb"}, 64, 32),
    }
    more = {"qa": (128, 128), "ka": (32, 128), "va": (32, 128), "kb": (64, 32), "vb": (64, 32)}
    model = GgmlModel(_rewritten(lm_source, tmp_path / "twice.gguf", layers, more), ONE, selftest=False)
    assert model.session.network.bundles["blk.0.attn"].layers == ("blk.0.attn_k", "blk.0.attn_v")
    assert np.isfinite(model.logits(ids_of(320))).all()


def test_a_program_that_never_ends_is_refused(lm_source: Path, tmp_path: Path) -> None:
    """Few bytes, no wide intermediate, and 10 GFLOP a token: hours of a self-test."""
    repeat = [["reshape", [4096, 128]], ["matmul", "b", 128, 128], ["reshape", [4096 * 128]]]
    steps = [["matmul", "u", 4096 * 128, 128], *repeat * 80, ["reshape", [128, 4096]], ["reduce_sum", 1]]
    layers = {"blk.0.attn_q": {"in": 128, "out": 128, "cores": {"u": "u", "b": "b"}, "steps": steps}}
    steps[0:1] = [["reshape", [128, 1]], ["matmul", "u", 4096, 1], ["reshape", [4096 * 128]]]
    more = {"u": (4096, 1), "b": (128, 128)}
    with pytest.raises(CheckpointError, match="operations a token, far too many"):
        GgmlModel(_rewritten(lm_source, tmp_path / "long.gguf", layers, more), ONE)


def test_without_the_extra_the_message_says_how_to_get_it(
    small: Path, lm_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_cpp.import_llama_cpp.cache_clear()
    library.library.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    try:
        with pytest.raises(RuntimeUnavailableError, match=r"edgec\[gguf\]"):
            open_artifact(small)
        with pytest.raises(RuntimeUnavailableError, match=r"edgec\[gguf\]"):
            artifact.refuse_unsupported(open_checkpoint(lm_source), modeling.DECODER_TASK)
    finally:
        llama_cpp.import_llama_cpp.cache_clear()
        library.library.cache_clear()


def test_layers_of_one_input_share_their_first_product(
    lm_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed (int4) and as they lie in the file (int8): the same numbers as one product per core."""
    _check_bundles(open_checkpoint(lm_source), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Gemma2", {"query_pre_attn_scalar": 32, "sliding_window": 9}),  # geglu
        ("Llama", {"mlp_bias": True}),  # packed together, though the biases keep the products apart
    ],
)
def test_pairs_of_other_families(
    family: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_family(tmp_path / "source", family, changes)
    _check_bundles(open_checkpoint(tmp_path / "source"), tmp_path, monkeypatch)


def _check_bundles(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = exported(checkpoint, factor(checkpoint, half), tmp_path / "out")
    ids = ids_of(int(checkpoint.config["vocab_size"])).tolist()

    def answers() -> tuple[GgmlModel, list[NDArray[Any]]]:
        model = GgmlModel(folder, ONE)
        model.session.start(64)
        return model, [model.session.prefill(ids).copy(), *(model.session.step(i).copy() for i in ids[:4])]

    model, found = answers()
    bundled = model.session.network.bundles
    assert bundled and all(model.session.weights.has(name) for name in bundled)
    stacks = [model.session.weights.stack(f"{name}{SECONDS}") for name in bundled if name.endswith(".ffn")]
    assert len(stacks) == checkpoint.config["num_hidden_layers"]
    device = Device(1)
    packs = b"CPU_REPACK" in [device.lib.backend_buft_name(memory) for memory in device.packed_memory()]
    assert all((stack is not None) == packs for stack in stacks)
    monkeypatch.setattr(Network, "bundles", {})
    model, expected = answers()
    assert not any(model.session.weights.has(name) for name in bundled)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("table", ["dense", "factored"])
def test_the_way_that_a_gpu_is_fed_gives_the_same_numbers(
    table: str, lm_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are copied, inputs sent and logits read back, as where memory is not the processor's; on its back end."""

    def choose(layer: Layer) -> tuple[Spec, str]:
        if layer.role == "embedding" and table == "factored":
            return Spec("table_svd", ranks=(64,)), "int8-b32"
        return half(layer)

    checkpoint = open_checkpoint(lm_source)
    folder = exported(checkpoint, factor(checkpoint, choose), tmp_path / "out")
    ids = ids_of(320)
    prompt = ids.reshape(-1).tolist()

    def answers() -> tuple[NDArray[Any], list[int]]:
        model = GgmlModel(folder, ONE, pack=False)
        return model.logits(ids), list(model.forced(prompt, 6))

    expected, tokens = answers()
    monkeypatch.setattr(tensors.Device, "on_cpu", property(lambda self: False, lambda self, value: None), raising=False)
    found, continued = answers()
    np.testing.assert_array_equal(found, expected)
    assert continued == tokens
