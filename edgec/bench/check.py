"""What an artifact answers, and which operators answered: `python -m edgec.bench.check`, a worker's job on stdin, one
JSON object on stdout.

A machine that is only emulated cannot be timed, but what it computes can be held against another machine. Both sides
run this file, so that they cannot differ in anything but the machine. It is no part of the worker, whose memory is
measured: a profiler's buffers and a second pass would be in it.
"""

from __future__ import annotations

import base64
import gc
import json
import platform
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np

from edgec.bench.jobs import Job
from edgec.errors import BenchError, EdgecError
from edgec.runtime.artifact import find_loader
from edgec.runtime.interfaces import ENCODER, CausalLM, Encoder, Floats
from edgec.runtime.options import RuntimeOptions

SENTENCES = 8
"""Sentences that an encoder is compared on, at most [count]."""

TOKENS = 24
"""Length of a causal LM's prompt [tokens]."""

ROWS = 8
"""Positions whose logits are compared, the last ones [count]: 8 x 262,144 floats are 8 MB."""

_MAX_PROFILE_BYTES = 256 * 1024 * 1024


def check(job: Job) -> dict[str, Any]:
    """Runs one pass: {"machine", "shape", "values": base64 of little-endian float32, "operators": {name: count}}.

    values: embeddings [sentences, d] or logits [positions, V]. operators: nodes that ran, by type; {} where the
    runtime is not onnxruntime.
    """
    folder = Path(job.folder)
    loader = find_loader(folder)
    loader.prepare()
    with tempfile.TemporaryDirectory(prefix="edgec-check-") as room:
        model = loader.load(folder, RuntimeOptions(job.threads, profile=str(Path(room) / "operators")))
        if model.task != job.task:
            raise BenchError(f"{folder} holds a model for {model.task}, not for {job.task}")
        values = _answers(model, job)
        del model
        gc.collect()  # the profile is written when the session goes
        operators = _operators(Path(room))
    data = base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")
    return {"machine": platform.machine(), "shape": list(values.shape), "values": data, "operators": operators}


def _answers(model: Encoder | CausalLM, job: Job) -> Floats:
    if model.task == ENCODER:
        sentences = job.sentences[:SENTENCES]
        return cast(Encoder, model).embed(sentences, batch_size=len(sentences))
    decoder = cast(CausalLM, model)
    chooser = random.Random(job.seed)  # noqa: S311 - reproducible, not secret
    ids = [chooser.randrange(decoder.vocab_size) for _ in range(TOKENS)]
    return decoder.logits(np.asarray([ids], dtype=np.int64))[-ROWS:]


def _operators(room: Path) -> dict[str, int]:
    """Nodes by operator type, from onnxruntime's profile: each node once, however often it ran."""
    seen: dict[str, str] = {}
    for path in room.glob("operators*.json"):
        if path.stat().st_size > _MAX_PROFILE_BYTES:
            raise BenchError(f"the operator profile has {path.stat().st_size} bytes; at most {_MAX_PROFILE_BYTES}")
        for event in json.loads(path.read_bytes()):
            details = event.get("args", {})
            if event.get("cat") == "Node" and "op_name" in details:
                seen[f"{details.get('node_index')} {event['name']}"] = str(details["op_name"])
    return dict(sorted(Counter(seen.values()).items()))


def main() -> int:
    try:
        answer = check(Job.from_json(sys.stdin.buffer.read()))
    except EdgecError as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
