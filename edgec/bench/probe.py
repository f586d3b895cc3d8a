"""A process that loads one small graph and times it: `python -m edgec.bench.probe`, a JSON job on stdin, one JSON
object on stdout.

`worker` measures finished artifacts; this measures a runtime's kernels before there is one, for estimates of time and
memory. It is separate because a worker's job names an artifact with its tokenizer, and because it too reports its own
memory, so that it must hold nothing else. Job: {"model": path or "", "loader": a file of `edgec.runtime`, "rows": M,
"threads": n, "seconds": s}. Answer: runtime_rss_bytes, and with a model peak_rss_bytes and run_ms: the quickest run,
since an estimate is of what the kernel takes and not of what the machine's other work took meanwhile.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from edgec import plugins
from edgec.bench.worker import memory
from edgec.runtime.options import RuntimeOptions, import_onnxruntime, session_options

_MOST_RUNS = 200


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Runs one job in this process."""
    plugins.load("edgec.runtime", job["loader"]).prepare()
    answer: dict[str, float] = {"runtime_rss_bytes": memory()[0]}
    if not job["model"]:
        return answer
    import numpy as np

    ort = import_onnxruntime()
    options = session_options(RuntimeOptions(int(job["threads"])))
    session = ort.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()
    x = np.random.default_rng(0).standard_normal((int(job["rows"]), given[0].shape[-1]), dtype=np.float32)
    feeds = {value.name: x for value in given}
    names = [output.name for output in session.get_outputs()]
    times: list[float] = []
    session.run(names, feeds)
    started = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - started < float(job["seconds"]) and len(times) < _MOST_RUNS):
        begun = time.perf_counter()
        session.run(names, feeds)
        times.append(time.perf_counter() - begun)
    return answer | {"peak_rss_bytes": memory()[1], "run_ms": 1e3 * min(times)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(json.load(sys.stdin))) + "\n")
