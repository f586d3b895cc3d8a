"""The frozen records that flow from stage to stage: plain data, printable, serialisable.

They live below every room that makes or reads them, so that stages hand data to one another without
importing one another. Anything that computes belongs in a room, not here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PLAN_VERSION = 1
ARITHMETICS = ("int8", "packed")
"""How an ONNX encoder multiplies: int8 products on weights that the session unpacks, or MatMulNBits on packed ones."""
MANIFEST_NAME = "edgec.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Spec:
    """The structure of one decomposition, without its numbers.

    kind: name of a file in `edgec/decompose/` ("dense", "svd", "tensor_train", …).
    ranks: bond dimensions χ, one per cut, from the output side to the input side; () for dense.
    modes: for a tensor train, the (out, in) mode sizes of each core from the output side to the input
        side; their products are the layer's out and in features. *Split* order is ((o1,1),(o2,1),(1,i1),(1,i2)).
    """

    kind: str
    ranks: tuple[int, ...] = ()
    modes: tuple[tuple[int, int], ...] = ()

    @property
    def factored(self) -> bool:
        """Is the matrix replaced by smaller ones? Not where it stays whole: as it is, rotated, or with a correction."""
        return self.kind not in ("dense", "residual") and not (self.kind == "disentangled" and not self.ranks)

    @property
    def quantization_only(self) -> bool:
        """As it is, or rotated first: as many numbers as before, of fewer bits."""
        return self.kind == "dense" or (self.kind == "disentangled" and not self.ranks)

    def __str__(self) -> str:
        text = self.kind
        if self.modes:
            text += "[" + " ".join(f"{o}x{i}" for o, i in self.modes) + "]"
        if self.ranks:
            text += " χ=" + ",".join(map(str, self.ranks))
        return text


@dataclass(frozen=True)
class Choice:
    """What a plan does with one layer.

    layer: module name in the transformers model, e.g. "encoder.layer.0.attention.self.query".
    role: "linear" (a transformer block's matrix), "head" or "embedding".
    shape: (out, in) of the dense weight; (vocabulary, width) for an embedding.
    format: name of the cores' number format, e.g. "fp32", "int8-b32", "int4-b64" (`edgec/quantize/formats.py`).
    bytes: stored bytes (codes, scales, zero points, padding). flops: per token or per row of x.
    error: relative functional error ‖(W − W̃)H^½‖ / ‖W H^½‖, or None where no activations were measured.
    loss: predicted end-to-end loss that this choice alone adds, or None.
    """

    layer: str
    role: str
    shape: tuple[int, int]
    spec: Spec
    format: str
    bytes: int
    flops: int
    error: float | None = None
    loss: float | None = None

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Choice:
        """Inverse of `as_dict` (JSON has no tuples). Raises KeyError, TypeError or ValueError for anything else."""
        spec = entry["spec"]
        modes = tuple((int(o), int(i)) for o, i in spec["modes"])
        structure = Spec(str(spec["kind"]), tuple(int(r) for r in spec["ranks"]), modes)
        out, in_ = entry["shape"]
        whole = {"out": out, "in": in_, "bytes": entry["bytes"]}
        if any(type(n) is not int or not 0 <= n < 1 << 62 for n in whole.values()):
            raise ValueError(f"{', '.join(whole)} are numbers of a size that a file can have")
        return cls(**{**entry, "spec": structure, "shape": (out, in_)})


@dataclass(frozen=True)
class LayerProfile:
    """One replaceable matrix.

    entropy: cut → von Neumann entropy [nats]; "svd" is the cut between outputs and inputs, others are named by the
    left modes. random: the same for a random matrix of that unfolding. singular: values at the svd cut, largest
    first. incompressible: the svd cut does not differ from a random matrix's. candidates: every plan choice that was
    fitted and scored.
    """

    name: str
    role: str
    shape: tuple[int, int]
    entropy: Mapping[str, float]
    random: Mapping[str, float]
    singular: tuple[float, ...]
    incompressible: bool
    tied_to: str | None = None
    candidates: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Plan:
    """One Choice per replaced layer, and what they add up to.

    fingerprint: of the checkpoint that it was made for. other_bytes: what ships beside the chosen layers
    (norms, biases, position tables), as the target stores it.
    """

    fingerprint: str
    target: str
    budget: str
    choices: tuple[Choice, ...]
    other_bytes: int = 0
    notes: tuple[str, ...] = ()
    version: int = PLAN_VERSION

    @property
    def bytes(self) -> int:
        """Predicted model bytes: every choice and everything else that ships in the model file."""
        return sum(c.bytes for c in self.choices) + self.other_bytes

    def linear_bpw(self) -> float:
        """8 × stored bytes ÷ parameters of the block linears that were replaced [bits per weight]."""
        linears = [c for c in self.choices if c.role == "linear"]
        parameters = sum(c.shape[0] * c.shape[1] for c in linears)
        return 8 * sum(c.bytes for c in linears) / parameters if parameters else 0.0

    def by_layer(self) -> dict[str, Choice]:
        return {c.layer: c for c in self.choices}


@dataclass(frozen=True)
class Target:
    """What one runtime on one kind of hardware executes fast; a plan offers nothing else.

    dense_formats, factored_formats, embedding_formats: core formats by role, best quality first; default_format what
    a uniform plan uses when it names none. residual_formats: pairs "backbone+correction". rank_multiple: bond
    dimensions are multiples of it. k_multiple: a quantised matmul's inner dimension must be a multiple of it (1:
    any). accuracy_level: MatMulNBits attribute; 4 computes in int8. artifact: what is written, by the name of a file
    in `edgec/export/artifacts/`. must_beat: a simpler target; a plan with corrections ships only where it measures
    better than that one's at the same budget. encoder_arithmetic: one of `ARITHMETICS`, for ONNX encoders.
    """

    name: str
    description: str
    dense_formats: tuple[str, ...]
    factored_formats: tuple[str, ...]
    embedding_formats: tuple[str, ...]
    default_format: str
    default_budget: str
    rank_multiple: int = 32
    k_multiple: int = 1
    accuracy_level: int = 4
    residual_formats: tuple[str, ...] = ()
    rotated_formats: tuple[str, ...] = ()
    artifact: str = "onnx"
    must_beat: str = ""
    encoder_arithmetic: str = "packed"

    @property
    def gguf(self) -> bool:
        """Is what it writes a GGUF file, run by ggml's kernels?"""
        return self.artifact.startswith("gguf")

    def formats_of(self, kind: str) -> tuple[str, ...]:
        """Names of the formats that a matrix decomposed in this way may have."""
        own = {"dense": self.dense_formats, "residual": self.residual_formats, "disentangled": self.rotated_formats}
        return own.get(kind, self.factored_formats)

    def multiplies_in_int8(self, *, encoder: bool) -> bool:
        """Are a model's quantised matrices unpacked to int8 when a session is created? A decoder's never are."""
        return encoder and self.encoder_arithmetic == "int8"


@dataclass(frozen=True)
class Spread:
    """The median of `n` measurements. low, high: where the true median is, with 90 % confidence if
    n is five or more (`edgec.bench.harness.spread`).
    """

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Roofline:
    """How near decoding comes to the memory that it reads from.

    weight_bytes, cache_bytes: read per token, weights as the runtime holds them and the cache half-way through the
    generated tokens. read_bytes_s: what the device's threads read per second. limit_tok_s: one divided by the other.
    distance: limit ÷ measured: 1 at the limit, 1.3 for 30 % away from it, below 1 where caches hold the weights.
    """

    weight_bytes: int
    cache_bytes: int
    read_bytes_s: float
    limit_tok_s: float
    distance: float


@dataclass(frozen=True)
class Measurement:
    """One bench row: one contestant on one device. Rates and times are medians over fresh processes.

    load_s: seconds from an empty process with the runtime imported to a usable session.
    ttft_ms, prefill_tok_s, decode_tok_s: causal LMs, at the stated prompt and generation lengths.
    step_ms, step_p95_ms: one decode step, median and 95th percentile inside a process.
    items_s: encoders, sentences per second at the stated batch; item_ms, item_p95_ms the latency of a single sentence.
    peak_rss_bytes: of the whole process; runtime_rss_bytes: the same process with the runtime imported, nothing loaded.
    mapped_rss_bytes: pages of files resident at the end, those from before loading left out; the system may drop them.
    rss_growth_bytes: peak RSS per 1000 further tokens of context. joules_token, joules_item: where the machine tells.
    artifact_bytes: model file and external data. kv_cache_bytes: keys and values of prompt and generated tokens.
    ceilings: of the device, `read_bytes_s` and `integer_op_s`. roofline: causal LMs whose files and device tell.
    """

    contestant: str
    device: str
    threads: int
    task: str
    settings: Mapping[str, int | float | str] = field(default_factory=dict)
    metrics: Mapping[str, Spread] = field(default_factory=dict)
    artifact_bytes: int = 0
    quality: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kv_cache_bytes: int = 0
    ceilings: Mapping[str, float] = field(default_factory=dict)
    roofline: Roofline | None = None


def as_dict(record: Any) -> dict[str, Any]:
    """A record as plain dicts, lists and scalars, ready for JSON or YAML."""
    result: dict[str, Any] = dataclasses.asdict(record)
    return result
