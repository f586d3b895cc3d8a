"""The worker as devices run it: a process, from the few files that are copied there."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import edgec
from edgec.bench import worker
from edgec.bench.devices import WORKER_FILES
from edgec.bench.devices.local import worker_environment
from edgec.bench.jobs import Answers, Job
from edgec.bench.text import sentences
from edgec.subprocesses import Finished, run

WORKER = [sys.executable, "-P", "-m", "edgec.bench.worker"]


def work(job: Job, **options: Any) -> tuple[Answers, Finished]:
    answers = Answers()
    settings = {"env": worker_environment(1), "timeout_s": 60, **options}
    return answers, run(WORKER, stdin=job.to_json(), on_line=lambda line: answers.take(line, job), **settings)


def encoder_job(folder: Path, **changes: Any) -> Job:
    settings = {"threads": 1, "samples": 2, "min_sample_s": 0.0, "sentences": sentences(3, 4), **changes}
    return Job(folder=str(folder), task="encoder", **settings)


def test_an_encoder_is_measured(encoder_folder: Path) -> None:
    answers, finished = work(encoder_job(encoder_folder))
    assert finished.ok and answers.done, (answers, finished)
    assert len(answers.samples) == 2 and {"items_s", "item_ms"} <= set(answers.samples[0])
    assert answers.peak_rss_bytes and answers.runtime_rss_bytes and answers.load_s
    assert answers.peak_rss_bytes >= answers.runtime_rss_bytes > 1 << 20
    assert (answers.mapped_rss_bytes or 0) < answers.peak_rss_bytes
    assert "onnxruntime" in answers.facts and answers.facts["sentence_tokens"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whose pages are resident")
def test_pages_of_files_are_told_apart(tmp_path: Path) -> None:
    file, size = tmp_path / "mapped", 32 << 20
    file.write_bytes(b"x" * size)
    before, shared = worker.file_pages(), worker._status()["RssShmem"]
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) > 0  # every page is touched
        found = worker.file_pages()
        if worker._status()["RssShmem"] - shared >= size:
            pytest.skip("the temporary folder is in memory, and its files' pages are no file's")
    assert size <= found - before + (1 << 20) and found < worker.memory()[0]


def test_a_causal_lm_is_measured(lm_folder: Path) -> None:
    job = Job(
        str(lm_folder), "causal-lm", 1, samples=1, min_sample_s=0.0, prompt_tokens=16, new_tokens=4,
        long_prompt_tokens=64,
    )  # fmt: skip
    answers, finished = work(job)
    assert finished.ok and answers.done, (answers, finished)
    assert {"ttft_ms", "prefill_tok_s", "decode_tok_s"} <= set(answers.samples[0])
    (short, short_rss), (long, long_rss) = answers.context_rss
    assert (short, long) == (16, 64) and min(short_rss, long_rss) > 1 << 20
    assert answers.facts["energy"]


def test_it_runs_from_the_files_that_are_copied_to_a_device(encoder_folder: Path, tmp_path: Path) -> None:
    source, target = Path(edgec.__file__).parent, tmp_path / "device" / "edgec"
    target.mkdir(parents=True)
    (target / "__init__.py").write_text("")
    for name in WORKER_FILES:
        (target / name).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (source / name).is_dir() else shutil.copyfile
        copy(source / name, target / name)
    environment = {**worker_environment(1), "PYTHONPATH": str(target.parent)}
    where = run([sys.executable, "-P", "-c", "import edgec; print(edgec.__file__)"], env=environment, timeout_s=60)
    assert where.stdout.decode().strip() == str(target / "__init__.py")
    every = (
        "import importlib, pkgutil, edgec.runtime as room\n"
        "names = [m.name for m in pkgutil.walk_packages(room.__path__, 'edgec.runtime.')]\n"
        "print(len([importlib.import_module(name) for name in names]))"
    )
    whole = run([sys.executable, "-P", "-c", every], env=environment, timeout_s=60)
    assert whole.ok and int(whole.stdout) > 5, whole.stderr.decode()[-500:]
    answers, finished = work(encoder_job(encoder_folder), env=environment, cwd=target.parent)
    assert finished.ok and answers.done, (answers, finished)


def test_its_peak_memory_is_its_own_and_not_its_parents(encoder_folder: Path) -> None:
    ballast = b"x" * (1 << 28)  # resident here, and more than a worker with a tiny model ever needs
    answers, _ = work(encoder_job(encoder_folder))
    assert answers.peak_rss_bytes and answers.peak_rss_bytes < len(ballast)


def test_failures_are_answers_too(tmp_path: Path, encoder_folder: Path) -> None:
    answers, finished = work(encoder_job(tmp_path / "missing"))
    assert finished.returncode == 1 and "missing" in answers.error and not answers.done
    answers, _ = work(Job(str(encoder_folder), "causal-lm", threads=1))
    assert "not for causal-lm" in answers.error
    answers, _ = work(encoder_job(encoder_folder, sentences=()))
    assert "sentences" in answers.error


def test_a_malformed_job_is_an_answer() -> None:
    done = run(WORKER, stdin=b"{", env=worker_environment(1), timeout_s=60)
    assert done.returncode == 1 and json.loads(done.stdout)["event"] == "error"


def test_what_libraries_print_does_not_reach_the_answers(encoder_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import edgec.runtime.ort_encoder as e\nold = e.prepare\n"
        "def prepare():\n    print('noise from python', flush=True)\n    import os; os.write(1, b'native noise\\n')\n"
        "    return old()\ne.prepare = prepare\n"
    )
    environment = worker_environment(1)
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
    answers, finished = work(encoder_job(encoder_folder), env=environment)
    assert finished.ok and answers.done, (answers, finished)
    assert b"noise from python" in finished.stderr and b"native noise" in finished.stderr


def test_the_95th_percentile_is_a_value_that_was_measured_and_not_the_slowest_of_many() -> None:
    values = [float(i) for i in range(1, 101)]
    assert worker._p95(values[::-1]) == 95.0
    assert worker._p95([3.0]) == 3.0
    assert worker._p95(values[:24]) == 23.0


def test_tails_are_told_beside_medians(encoder_folder: Path, lm_folder: Path) -> None:
    for job, name in (
        (encoder_job(encoder_folder, samples=1, min_sample_s=0.01), "item"),
        (Job(str(lm_folder), "causal-lm", 1, samples=1, min_sample_s=0.0, prompt_tokens=16, new_tokens=8), "step"),
    ):
        answers, finished = work(job)
        assert finished.ok and answers.done, (answers, finished)
        (sample,) = answers.samples
        assert 0 < sample[f"{name}_ms"] <= sample[f"{name}_p95_ms"]
