"""The Compressed folder: factors in safetensors, config, tokenizer, plan; `load` gives back a transformers model.

Names: `<layer>.cores.<core>` for floats; `….codes` (packed, uint8), `….scales` and `….zero_points` for quantised ones,
`….blocks` for ggml's own types; `<layer>.cores.input_rms` for what is known of the layer's input. Everything that was
not replaced keeps its name. A head that shares its table's cores stores nothing of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edgec import modeling
from edgec.checkpoint import Checkpoint, open_checkpoint, read_json
from edgec.companions import copy_companions
from edgec.compress.apply import apply_factors
from edgec.contraction import core_shapes
from edgec.errors import CheckpointError, PlanError
from edgec.fit import Core, Factors, contraction_of, core_formats
from edgec.outputs import staged_folder
from edgec.quantize.formats import CoreFormat, LayerFormat, QuantizedTensor, unpack_bits
from edgec.quantize.ggml_formats import GgmlFormat, GgmlTensor
from edgec.records import Choice, Plan, as_dict

COMPRESSED_VERSION = 1
_CONFIG_KEY = "edgec"


@dataclass(frozen=True)
class Compressed:
    """A compressed checkpoint as read from its folder. dense_fingerprint: of the checkpoint that it was made from."""

    checkpoint: Checkpoint
    plan: Plan
    dense_fingerprint: str


def is_compressed(folder: Path) -> bool:
    """Does config.json carry edgec's mark?"""
    config = folder / "config.json"
    return config.is_file() and _CONFIG_KEY in read_json(config)


def save_compressed(
    checkpoint: Checkpoint,
    plan: Plan,
    factors: Mapping[str, Factors],
    plan_text: str,
    out: Path,
    *,
    force: bool = False,
) -> None:
    """Write the folder, whole or not at all. Equal inputs give equal bytes."""
    replaced = {f"{name}.weight" for name in factors}
    model = modeling.skeleton(checkpoint)
    tensors: dict[str, NDArray[Any]] = {}
    for name, place in modeling.places(model, checkpoint).items():
        if place not in replaced:
            tensors[place] = checkpoint.read(name)  # contiguous already; ascontiguousarray would give scalars an axis
    aliases: dict[str, str] = {}
    tensors.update(factor_tensors(factors, aliases))
    config = {
        **checkpoint.config,
        _CONFIG_KEY: {
            "version": COMPRESSED_VERSION,
            "dense_fingerprint": checkpoint.fingerprint,
            "plan": as_dict(plan),
            "aliases": aliases,
        },
    }
    with staged_folder(out, force=force) as stage:
        (stage / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        (stage / "plan.yaml").write_text(plan_text, encoding="utf-8")
        manifest = {"kind": "compressed", "version": COMPRESSED_VERSION, "fingerprint": checkpoint.fingerprint}
        (stage / "edgec.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        save_file(dict(sorted(tensors.items())), stage / "model.safetensors")
        copy_companions(checkpoint.folder, stage)


def open_compressed(folder: Path) -> Compressed:
    """Raises CheckpointError when the folder is not one that `edgec compress` wrote."""
    checkpoint = open_checkpoint(folder)
    body = checkpoint.config.get(_CONFIG_KEY)
    try:
        if not isinstance(body, dict) or body["version"] != COMPRESSED_VERSION:
            raise CheckpointError(f"{folder}: not a folder that this version of `edgec compress` wrote")
        if not isinstance(body["aliases"], dict):
            raise TypeError("aliases are no mapping")
        entry = body["plan"]
        choices = tuple(Choice.from_dict(c) for c in entry["choices"])
        plan = Plan(
            entry["fingerprint"], entry["target"], entry["budget"], choices, entry["other_bytes"], tuple(entry["notes"])
        )
        return Compressed(checkpoint, plan, str(body["dense_fingerprint"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: the edgec section is damaged ({error!r})") from error


def read_factors(compressed: Compressed) -> dict[str, Factors]:
    """Every layer's factors, checked against the plan. Raises CheckpointError naming the tensor."""
    aliases = compressed.checkpoint.config[_CONFIG_KEY]["aliases"]
    cores: dict[str, Core] = {}

    def read(key: str, shape: tuple[int, ...], fmt: CoreFormat) -> Core:
        key = aliases.get(key, key)
        if key not in cores:
            cores[key] = _core(compressed.checkpoint, key, shape, fmt)
        return cores[key]

    factors = {}
    for choice in compressed.plan.choices:
        contraction = contraction_of(choice.spec, choice.shape, choice.role)
        formats = core_formats(contraction, LayerFormat.parse(choice.format))
        found = {
            name: read(f"{choice.layer}.cores.{name}", shape, formats[name])
            for name, shape in core_shapes(contraction).items()
        }
        factors[choice.layer] = Factors(contraction, found, _input_rms(compressed.checkpoint, choice))
    return factors


def load(folder: Path | str) -> transformers.PreTrainedModel:
    """A transformers model of a compressed folder, its cores as float32 parameters. Raises CheckpointError."""
    compressed = open_compressed(Path(folder))
    return assemble(compressed.checkpoint, read_factors(compressed))


def assemble(checkpoint: Checkpoint, factors: Mapping[str, Factors]) -> transformers.PreTrainedModel:
    """The model with factored modules for `factors` and the checkpoint's tensors for everything else, float32, in eval
    mode.

    The dense weights of factored layers are never read. Raises CheckpointError where a tensor is missing.
    """
    model = modeling.empty(checkpoint)
    apply_factors(model, factors)
    state = {
        place: torch.from_numpy(np.array(checkpoint.read(name)).astype(np.float32))
        for name, place in modeling.places(model, checkpoint).items()
        if ".cores." not in name
    }
    missing, _ = model.load_state_dict(state, strict=False)
    if lacking := [name for name in missing if ".cores." not in name]:
        raise CheckpointError(f"{checkpoint.folder}: {len(lacking)} tensors are missing, first {lacking[0]!r}")
    model.eval()
    model.requires_grad_(False)
    return model


def densify(compressed: Compressed, out: Path) -> Checkpoint:
    """Write an ordinary transformers folder whose replaced weights are what the factors stand for (float32), into
    `out`.

    Front ends that trace or build from dense folders start here; the lowering then replaces those weights again.
    """
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: np.array(compressed.checkpoint.read(name))
        for name in compressed.checkpoint.tensors
        if ".cores." not in name
    }
    for layer, fitted in read_factors(compressed).items():
        tensors[f"{layer}.weight"] = np.ascontiguousarray(fitted.dense())
    config = {k: v for k, v in compressed.checkpoint.config.items() if k != _CONFIG_KEY}
    if config.get("tie_word_embeddings"):
        model = modeling.without_memory(compressed.checkpoint)
        head = next((layer for layer in modeling.layers(model) if layer.tied_to), None)
        if head is not None:
            tensors.pop(f"{head.name}.weight", None)
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, out / "model.safetensors")
    copy_companions(compressed.checkpoint.folder, out)
    return open_checkpoint(out)


def factor_tensors(factors: Mapping[str, Factors], aliases: dict[str, str]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Name and values of everything that the folder stores of these layers. Cores that layers share come once;
    `aliases` gets the other names, each with the one that is stored.
    """
    owners: dict[int, str] = {}
    for layer, fitted in sorted(factors.items()):
        for core, stored in fitted.cores.items():
            key = f"{layer}.cores.{core}"
            if id(stored) in owners:
                aliases[key] = owners[id(stored)]
                continue
            owners[id(stored)] = key
            yield from _tensors(key, stored).items()
        if fitted.input_rms is not None:
            yield _input_rms_key(layer), fitted.input_rms


def _tensors(key: str, stored: Core) -> dict[str, NDArray[Any]]:
    if not isinstance(stored, QuantizedTensor):
        return {key: np.ascontiguousarray(stored)}
    if isinstance(stored, GgmlTensor):
        return {f"{key}.blocks": stored.codes}
    tensors = {f"{key}.codes": stored.packed().reshape(stored.shape[0], -1), f"{key}.scales": stored.scales}
    if (zero_points := stored.packed_zero_points()) is not None:
        tensors[f"{key}.zero_points"] = zero_points
    return tensors


def _input_rms_key(layer: str) -> str:
    return f"{layer}.cores.input_rms"


def _input_rms(checkpoint: Checkpoint, choice: Choice) -> NDArray[np.float32] | None:
    key = _input_rms_key(choice.layer)
    if key not in checkpoint.tensors:
        return None
    found = np.array(checkpoint.read(key), np.float32)
    if found.shape != choice.shape[1:] or not (np.isfinite(found).all() and (found >= 0).all()):
        raise CheckpointError(f"{checkpoint.folder}: {key!r} is not one root mean square for each of {choice.shape[1]}")
    return found


def _core(checkpoint: Checkpoint, key: str, shape: tuple[int, ...], fmt: CoreFormat) -> Core:
    if key in checkpoint.tensors:
        core = checkpoint.read(key)
        if core.shape != shape:
            raise CheckpointError(f"{checkpoint.folder}: {key!r} is {core.shape}, the plan makes it {shape}")
        return np.array(core)
    try:
        if isinstance(fmt, GgmlFormat):
            return GgmlTensor.of(fmt, (shape[0], shape[1]), np.array(checkpoint.read(f"{key}.blocks")))
        codes, scales = np.array(checkpoint.read(f"{key}.codes")), np.array(checkpoint.read(f"{key}.scales"))
        n, k = shape
        blocks = fmt.blocks(k)
        if (
            codes.shape != (n, blocks * fmt.block * fmt.bits // 8)
            or scales.shape != (n, blocks)
            or codes.dtype != np.uint8
        ):
            raise CheckpointError(
                f"{checkpoint.folder}: {key!r} has codes {codes.shape} and scales {scales.shape}; not {fmt} of {shape}"
            )
        zero_points = None
        if fmt.zero_points:
            zero_points = unpack_bits(np.array(checkpoint.read(f"{key}.zero_points")), fmt.bits, blocks)
    except KeyError as error:
        raise CheckpointError(f"{checkpoint.folder}: tensor {error.args[0]!r} is missing") from error
    except PlanError as error:
        raise CheckpointError(f"{checkpoint.folder}: {key!r}: {error}") from error
    return QuantizedTensor(fmt, (n, k), unpack_bits(codes, fmt.bits, blocks * fmt.block), scales, zero_points)
