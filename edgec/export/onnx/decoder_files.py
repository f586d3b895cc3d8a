"""The files of an onnxruntime-genai folder beside the model: genai_config.json, the tokenizer, the chat template.

The tokenizer's files are copied as they are rather than saved again by transformers: genai reads the same files, and a
rewritten tokenizer is the classic way to a model that speaks slightly wrong. Only `tokenizer_config.json` is edited.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import transformers

from edgec import limits
from edgec.errors import CheckpointError
from edgec.export.onnx.genai_builder import printing_to_log

_log = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 4096
"""Longest text that genai generates unless its caller asks for more, up to context_length [tokens]. genai allocates the
KV cache for this length at once: the builder's default, the whole context, is 8.6 GB for a 1.2 B Llama.
"""

_COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_CONFIG = "tokenizer_config.json"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def make_genai_config(genai: Any, config: Any, source: Path, work: Path) -> dict[str, Any]:
    """The content of genai_config.json, from the builder `genai`, with its special tokens checked.

    The builder reads config.json, generation_config.json and the tokenizer: search defaults come from the second, and
    the tokenizer's end-of-turn token joins the eos ids, which config.json often lacks.
    """
    folder = work / "genai"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with printing_to_log():
            genai.make_genai_config(copy.deepcopy(config), {"local_files_only": True}, str(folder))
    except ValueError as error:
        if "eos_token_id" not in str(error):
            raise
        raise CheckpointError(
            f"{source}: neither config.json, generation_config.json nor the tokenizer names an end-of-text token; "
            "add eos_token_id to config.json"
        ) from error
    content: dict[str, Any] = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    _check_special_tokens(content["model"], config, source)
    search = content["search"]
    search["max_length"] = min(int(search["max_length"]), DEFAULT_MAX_LENGTH)
    return content


def write_tokenizer(source: Path, context_length: int, out: Path) -> None:
    """The tokenizer and chat template of the folder `source` into `out`; nothing for a model without a tokenizer.

    genai needs tokenizer.json and tokenizer_config.json; where only an older form is there, transformers converts it.
    A folder without any vocabulary still loads in genai, which then takes and gives token ids only.
    """
    if not any((source / name).is_file() for name in _VOCABULARIES):
        _log.warning("%s has no tokenizer: the exported model takes and gives token ids only", source)
        return
    if not all((source / name).is_file() for name in ("tokenizer.json", _CONFIG)):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                source, local_files_only=True, trust_remote_code=False
            )
            tokenizer.model_max_length = context_length
            tokenizer.save_pretrained(out)
        except Exception as error:
            raise CheckpointError(
                f"{source} has a tokenizer that cannot be converted to tokenizer.json: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        return
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    (out / _CONFIG).write_text(
        json.dumps(_tokenizer_config(source / _CONFIG, context_length), indent=2, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )


def _tokenizer_config(file: Path, context_length: int) -> dict[str, Any]:
    """tokenizer_config.json with a model_max_length that is a length (many say 1e30) and no code to load."""
    if file.stat().st_size > limits.MAX_JSON_BYTES:
        raise CheckpointError(f"{file} is larger than {limits.MAX_JSON_BYTES} bytes")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}; expected an object")
    content.pop("auto_map", None)
    content["model_max_length"] = context_length
    return content


def _check_special_tokens(model: dict[str, Any], config: Any, source: Path) -> None:
    """Every id must be in the vocabulary; an absent BOS stays absent (the builder writes 1)."""
    size = int(config.vocab_size)
    eos = model["eos_token_id"]
    ids = list(eos) if isinstance(eos, list) else [eos]
    for token in ids:
        if not isinstance(token, int) or not 0 <= token < size:
            raise CheckpointError(f"{source}: eos_token_id {token} is no id of the vocabulary (0 to {size - 1})")
    if not 0 <= int(model["pad_token_id"]) < size:  # -1 is how some configs say "none"
        model["pad_token_id"] = ids[0]
    bos = model["bos_token_id"]
    named = getattr(config, "bos_token_id", None) is not None or bos != 1
    if not named and (source / _CONFIG).is_file():
        named = bool(_tokenizer_config(source / _CONFIG, 0).get("bos_token"))
    if not named or not 0 <= int(bos) < size:
        del model["bos_token_id"]
