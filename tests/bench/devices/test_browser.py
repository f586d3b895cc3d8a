"""The browser device without a browser: a stand-in that speaks to the page's server as the page does."""

from __future__ import annotations

import fnmatch
import http.client
import json
import shutil
import stat
import sys
import tomllib
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from edgec.bench.browser_job import page_job
from edgec.bench.devices import browser, file, open_device
from edgec.bench.devices._browser_server import PageServer
from edgec.bench.harness import BenchSettings, Contestant, run_bench
from edgec.bench.jobs import Job
from edgec.errors import BenchError, CheckpointError, UsageError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the device reads /proc")
QUICK = BenchSettings(rounds=1, samples=2, warmup=0, min_sample_s=0.0, batch=2, threads=1, timeout_s=30)

# The browser starts a process that looks like a page's, as Chromium does, and waits to be stopped.
_BROWSER = """#!{python}
import subprocess, sys
page = subprocess.Popen([sys.executable, "-S", "-c", {page!r}, "--type=renderer", sys.argv[-1]])
page.wait()
{after}
"""
_PAGE = """
import json, sys, urllib.request
base = sys.argv[-1].removesuffix("page.html")
def get(name): return urllib.request.urlopen(base + name).read()
def post(event, **values):
    body = event if isinstance(event, bytes) else json.dumps({"event": event, **values}).encode()
    return urllib.request.urlopen(urllib.request.Request(base + "events", data=body)).status
get("page.html"), get("worker.mjs"), get("ort/ort.wasm.min.mjs")
job = json.loads(get("job.json"))
size = len(get(job["model"]))
"""
_MEASURED = """
post("ready", versions={"onnxruntime-web": "9.9"})
post("loaded", load_s=0.5, sentence_tokens=job["sentence_tokens"])
for i in range(2): post("sample", metrics={"items_s": 10.0 + i, "item_ms": 1.0})
"""
_DONE = 'post("measured")\npost("answer", shape=[1, 1], values="AACAPw==")\npost("done")\n'


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """What npm would have installed."""
    folder = tmp_path / "node_modules" / "onnxruntime-web"
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": "onnxruntime-web", "version": "9.9.9"}))
    (folder / "dist" / "ort.wasm.min.mjs").write_text("export {};")
    return folder


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: Path) -> Callable[..., browser.BrowserDevice]:
    def make(script: str, after: str = "import time; time.sleep(60)") -> browser.BrowserDevice:
        program = tmp_path / "browser"
        program.write_text(_BROWSER.format(python=sys.executable, page=_PAGE + script, after=after))
        program.chmod(stat.S_IRWXU)
        monkeypatch.setenv("EDGEC_BROWSER", str(program))
        return browser.create(str(package))

    return make


def test_a_page_measures(stand_in: Callable[..., browser.BrowserDevice], encoder_folder: Path) -> None:
    (row,) = run_bench([Contestant("a", encoder_folder)], QUICK, device=stand_in(_MEASURED + _DONE))
    assert row.metrics["items_s"].value == 10.5
    assert row.metrics["peak_rss_bytes"].value >= row.metrics["runtime_rss_bytes"].value > 1_000_000
    assert row.settings["onnxruntime-web"] == "9.9"
    assert any("9.9.9 (WASM)" in note for note in row.notes)
    assert any("shapes (1, 1)" in note for note in row.notes)  # the stand-in's answer is not the model's
    assert not any(note.startswith(("failed", "incomplete")) for note in row.notes)


def test_a_browser_that_dies_midway_keeps_its_samples(
    stand_in: Callable[..., browser.BrowserDevice], encoder_folder: Path
) -> None:
    device = stand_in(_MEASURED, after="sys.exit('out of memory')")
    (row,) = run_bench([Contestant("a", encoder_folder)], QUICK, device=device)
    assert row.metrics["items_s"].n == 1
    assert any(n.startswith("incomplete") and "out of memory (2 of 2 samples kept)" in n for n in row.notes)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('post("error", message="no kernel for NoSuchOperator")', "no kernel for NoSuchOperator"),
        ('post(b"nonsense")', "not JSON"),
        ('post("ready", versions={}); post("loaded", load_s=float("nan"))', "load_s is nan"),
        ('post("ready", versions={}); post("loaded", load_s=-1)', "load_s is -1"),
        ('[post("sample", metrics={"items_s": 1.0}) for _ in range(9)]', "more than the 2 samples"),
        ('post("launch")', "unknown event"),
    ],
)
def test_a_page_that_fails_or_lies(
    stand_in: Callable[..., browser.BrowserDevice], encoder_folder: Path, script: str, message: str
) -> None:
    settings = BenchSettings(rounds=1, samples=2, warmup=0, batch=2, threads=1, timeout_s=30)
    device = stand_in(script)
    try:
        (row,) = run_bench([Contestant("a", encoder_folder)], settings, device=device)
        told = " ".join(row.notes)
    except BenchError as error:
        told = str(error)
    assert message in told


def test_a_page_that_hangs_is_stopped(stand_in: Callable[..., browser.BrowserDevice], encoder_folder: Path) -> None:
    settings = BenchSettings(rounds=1, samples=1, warmup=0, batch=2, threads=1, timeout_s=2)
    with pytest.raises(BenchError, match="stopped after 2 s without finishing"):
        run_bench([Contestant("a", encoder_folder)], settings, device=stand_in("import time; time.sleep(60)"))


def test_what_is_missing_is_told(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEC_BROWSER", sys.executable)
    monkeypatch.delenv("EDGEC_ORT_WEB", raising=False)
    with pytest.raises(UsageError, match="npm install onnxruntime-web"):
        open_device("browser")
    with pytest.raises(UsageError, match="is no installed onnxruntime-web"):
        open_device(f"browser:{tmp_path}")
    assert any("npm install" in line for line in file("browser").needs())
    monkeypatch.setenv("EDGEC_ORT_WEB", str(package))
    assert file("browser").needs() == ()
    (package / "package.json").write_text('{"name": "left-pad", "version": "1"}')
    assert "'left-pad'" in file("browser").needs()[0]
    monkeypatch.setenv("EDGEC_BROWSER", str(tmp_path / "absent"))
    assert "was not found" in file("browser").needs()[0]


def test_the_page_ships_with_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["edgec"]
    for path in browser._PAGE.iterdir():
        name = f"bench/devices/_browser/{path.name}"
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name


# What the page gets


def test_an_encoders_job_is_numbers(encoder_folder: Path) -> None:
    job = Job(str(encoder_folder), "encoder", 2, samples=1, sentences=("the cat sat", "a dog"))
    page = page_job(job)
    assert page.record["inputs"] == {"input_ids": "int64", "attention_mask": "int64"}
    assert page.record["batch"]["shape"] == [2, 3]
    assert page.record["batch"]["attention_mask"] == [1, 1, 1, 1, 1, 0]
    assert page.record["sentence_tokens"] == 2.5
    assert (page.record["output"], page.record["pool"]) == ("sentence_embedding", False)
    assert page.files == {"model/0": encoder_folder / "model.onnx"}
    json.dumps(page.record, allow_nan=False)


def test_a_decoders_job_names_its_cache(lm_folder: Path) -> None:
    page = page_job(Job(str(lm_folder), "causal-lm", 1, prompt_tokens=5, new_tokens=2))
    record = page.record
    assert record["cache"]["type"] == "float32" and record["cache"]["shape"][2] == 0
    assert len(record["cache"]["pairs"]) % 2 == 0
    assert record["names"]["logits"] == "logits" and len(record["prompt"]) == 5
    assert [entry["url"] for entry in record["external"]] == [f"model/{i + 1}" for i in range(len(page.files) - 1)]
    with pytest.raises(BenchError, match="do not fit the context"):
        page_job(Job(str(lm_folder), "causal-lm", 1, prompt_tokens=1 << 19, new_tokens=2))


def _rewritten(folder: Path, change: Callable[[Any], None]) -> Path:
    model = onnx.load(folder / "model.onnx")
    change(model.graph)
    (folder / "model.onnx").write_bytes(model.SerializeToString())  # onnx.save refuses what a stranger may have written
    return folder


def test_artifacts_that_a_page_cannot_run(encoder_folder: Path, tmp_path: Path) -> None:
    job = Job(str(encoder_folder), "encoder", 1, sentences=("a",))
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model.gguf").write_bytes(b"")
    with pytest.raises(BenchError, match="ONNX artifacts only"):
        page_job(Job(str(gguf), "causal-lm", 1))
    escaped = shutil.copytree(encoder_folder, tmp_path / "escaped")

    def leave(graph: Any) -> None:
        tensor = graph.initializer.add()
        tensor.CopyFrom(graph.initializer[0])
        tensor.name, tensor.data_location = "outside", onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../secret")

    with pytest.raises(CheckpointError, match="outside"):
        page_job(Job(str(_rewritten(escaped, leave)), "encoder", 1, sentences=("a",)))

    def rename(graph: Any) -> None:
        graph.input[0].name = "pixels"

    with pytest.raises(BenchError, match="no encoder for the browser"):
        page_job(Job(str(_rewritten(encoder_folder, rename)), "encoder", 1, sentences=("a",)))
    (encoder_folder / "model.onnx").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="is no ONNX model"):
        page_job(job)


# The server


def test_only_named_files_below_the_secret_path(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("page")
    (tmp_path / "secret").write_text("secret")
    seen: list[bytes] = []

    def take(body: bytes) -> bool:
        seen.append(body)
        return body != b"bad"

    with PageServer({"page.html": tmp_path / "page.html", "job.json": b"{}"}, take) as server:
        url = urllib.parse.urlsplit(server.url)
        below = url.path.removesuffix("page.html")

        def ask(method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
            connection = http.client.HTTPConnection(str(url.hostname), url.port, timeout=10)
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            result = answer.status, answer.read(), dict(answer.getheaders())
            connection.close()
            return result

        status, body, headers = ask("GET", url.path)
        assert (status, body, headers["Content-Type"]) == (200, b"page", "text/html")
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert ask("GET", below + "job.json")[1] == b"{}"
        for path in ("/page.html", "/", below, below + "secret", below + "../secret", below + "%2e%2e/secret", "//x/"):
            assert ask("GET", path)[0] == 404
        assert ask("POST", "/events", b"x")[0] == 404 and not seen
        assert ask("POST", below + "events", b"good")[0] == 200
        assert ask("POST", below + "events", b"bad")[0] == 400
        assert ask("POST", below + "events", b"", **{"Content-Length": str(1 << 40)})[0] == 413
        assert seen == [b"good", b"bad"]
