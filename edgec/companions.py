"""Files that travel beside a model unchanged: tokenizer, chat template, generation defaults, pooling configuration."""

from __future__ import annotations

import shutil
from pathlib import Path

NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)


def copy_companions(folder: Path, out: Path) -> None:
    """Copy every known file that `folder` has, byte for byte; nothing else in the folder is looked at."""
    for name in NAMES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    for pooling in sorted(folder.glob("[0-9]_Pooling/config.json")):
        (out / pooling.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(pooling, out / pooling.parent.name / "config.json")
