"""optimum-onnx's export: what is needed is said, and its graphs run here; a stand-in interpreter makes them."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest
from models_for_tests import write_encoder

from edgec.bench.baselines import make, optimum_onnx
from edgec.errors import BenchError, CheckpointError, RuntimeUnavailableError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "vocab_size": 300,
    "eos_token_id": [2, 3],
    "num_key_value_heads": None,
}


def stand_in(path: Path, body: str) -> Path:
    path.write_text(
        f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\nsource, out, task = sys.argv[3:]\n{body}\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_without_an_environment_it_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(optimum_onnx.INTERPRETER, raising=False)
    with pytest.raises(RuntimeUnavailableError, match=r"set EDGEC_OPTIMUM_PYTHON .*make optimum-env"):
        make("optimum", "encoder", tmp_path, tmp_path / "out")
    monkeypatch.setenv(optimum_onnx.INTERPRETER, str(tmp_path / "gone"))
    with pytest.raises(RuntimeUnavailableError, match="gone', which is no file"):
        make("optimum", "encoder", tmp_path, tmp_path / "out")


def test_the_other_interpreter_gets_the_task_and_none_of_our_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_encoder(tmp_path / "model")
    body = (
        "import json, os\n"
        "Path(out, 'model.onnx').write_bytes(b'graph')\n"
        "Path(out, 'optimum.json').write_text(json.dumps({'optimum-onnx': '0.1.0', 'transformers': '4.57.6'}))\n"
        "Path(out, 'seen.json').write_text(json.dumps([task, source, os.environ.get('PYTHONPATH')]))"
    )
    monkeypatch.setenv(optimum_onnx.INTERPRETER, str(stand_in(tmp_path / "python", body)))
    out = make("optimum", "encoder", source, tmp_path / "out")
    assert json.loads((out / "seen.json").read_text()) == ["feature-extraction", str(source), None]
    assert {"model.onnx", "tokenizer.json", "config.json"} <= {file.name for file in out.iterdir()}
    assert optimum_onnx.notes(out) == ("optimum-onnx 0.1.0, transformers 4.57.6",)


def test_its_failure_is_told_in_its_own_words_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_encoder(tmp_path / "model")
    failing = stand_in(tmp_path / "python", "sys.exit('No module named optimum')")
    monkeypatch.setenv(optimum_onnx.INTERPRETER, str(failing))
    with pytest.raises(BenchError, match=r"optimum-onnx, fp32.*No module named optimum"):
        make("optimum", "encoder", source, tmp_path / "out")
    (source / "modules.json").write_text(
        json.dumps(
            [
                {"path": "", "type": "sentence_transformers.models.Transformer"},
                {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            ]
        )
    )
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    with pytest.raises(BenchError, match="pooled by mean; .* wants cls"):
        make("optimum", "encoder", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_genai_is_told_the_shape_of_the_cache(tmp_path: Path) -> None:
    made = optimum_onnx.genai_config(CONFIG, tmp_path)
    decoder = made["model"]["decoder"]
    assert (decoder["head_size"], decoder["num_key_value_heads"], made["model"]["pad_token_id"]) == (16, 4, 2)
    assert decoder["inputs"]["past_value_names"] == "past_key_values.%d.value"
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        optimum_onnx.genai_config({**CONFIG, "num_hidden_layers": "two"}, tmp_path)
