"""How many bytes an artifact is: the model file and the external data that it names."""

from __future__ import annotations

from pathlib import Path

from edgec.bench.jobs import PEER_FILE
from edgec.errors import BenchError
from edgec.gguf_header import is_gguf
from edgec.runtime.layout import inside, is_compressed, optional_json

MODEL_FILES = ("model.onnx", "model.gguf", "model.factored.gguf")
ADAPTER_FILE = "adapter.gguf"


def holds_gguf(path: Path) -> bool:
    """One GGUF file, or a folder with one."""
    return is_gguf(path) or any(path.glob("*.gguf"))


def model_file(folder: Path) -> Path:
    """The model file of an artifact folder, or the .gguf file that is given instead of one.

    Raises BenchError without one, CheckpointError when it lies outside.
    """
    if folder.is_file():
        return folder
    config = folder / "genai_config.json"
    model = optional_json(config).get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if isinstance(decoder, dict):
        return inside(folder, decoder.get("filename", "model.onnx"), config)
    for name in MODEL_FILES:
        if (folder / name).is_file():
            return folder / name
    if (folder / PEER_FILE).is_file():
        raise BenchError(f"{folder} holds no model file: another tool reads the checkpoint itself")
    raise BenchError(f"{folder} holds no model file (looked for {', '.join(MODEL_FILES)})")


def _weight_files(checkpoint: Path) -> list[Path]:
    """The files that a checkpoint is loaded from; others may lie beside them."""
    single, index = checkpoint / "model.safetensors", checkpoint / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    shards = optional_json(index).get("weight_map")
    names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    return [inside(checkpoint, name, index) for name in names] or sorted(checkpoint.glob("*.safetensors"))


def artifact_bytes(folder: Path) -> int:
    """Model file plus external data or adapter [bytes]; tokenizer and configuration beside them are not counted. Of a
    folder that another tool runs, the weight files of the checkpoint that it names; of what `edgec compress` wrote,
    its own.
    """
    if is_compressed(folder):
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if (folder / PEER_FILE).is_file():
        checkpoint = optional_json(folder / PEER_FILE).get("checkpoint")
        weights = _weight_files(Path(checkpoint)) if isinstance(checkpoint, str) else []
        if weights:
            return sum(file.stat().st_size for file in weights)
    path = model_file(folder)
    files = {path.resolve(): path.stat().st_size}
    adapter = folder / ADAPTER_FILE
    if path.suffix == ".gguf" and adapter.is_file():
        files[adapter.resolve()] = adapter.stat().st_size
    for location in sorted(_external(path)) if path.suffix == ".onnx" else ():
        data = inside(folder, location, path)
        files[data.resolve()] = data.stat().st_size
    return sum(files.values())


def _external(path: Path) -> set[str]:
    """File names that the graph's initializers point to (subgraphs included); no tensor is read."""
    import onnx_ir as ir

    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's DecodeError, ValueError and more, depending on what is broken
        raise BenchError(f"{path} cannot be read as ONNX: {error}") from error
    values = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    return {str(value.location) for value in values if isinstance(value, ir.ExternalTensor)}
