"""How sessions use the machine: one place, so that two contestants never differ by accident.

Threads: onnxruntime and onnxruntime-genai choose differently by default (all physical cores; at most 16), so the
count is always set. Spinning: by default onnxruntime's idle threads spin for a while after each run, which steals
cores from the application; here they spin within a run (a decode step is many short kernels, and waking a thread
costs as much as one) and stop when it ends. Telemetry: both runtimes can send usage events; edgec turns it off.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgec.errors import CheckpointError, RuntimeUnavailableError, UsageError

if TYPE_CHECKING:
    import onnxruntime

Spin = Literal["run", "never", "always"]

_SPIN_ENTRIES: dict[str, dict[str, str]] = {
    "run": {"session.intra_op.allow_spinning": "1", "session.force_spinning_stop": "1"},
    "never": {"session.intra_op.allow_spinning": "0"},
    "always": {"session.intra_op.allow_spinning": "1"},
}
MAX_THREADS = 1024
MAX_GPU = 63
_CUDA = "CUDAExecutionProvider"
_PRODUCTS = re.compile(r"MatMul|Gemm|Attention")
"""Types of nodes that do the work of a transformer."""
KV_CACHES = ("f16", "q8_0")
"""Types of a GGUF runtime's cache, ggml's names: two bytes a number, or 34 bytes for 32 of them."""


@dataclass(frozen=True)
class RuntimeOptions:
    """threads: of one operator; 0 means all physical cores that this process may use. spin: when idle threads spin.

    kv_cache: type that keys and values are kept in, for runtimes that let one choose when a model is opened (GGUF): one
    of `KV_CACHES`, or "" for the runtime's own; ONNX graphs state theirs.
    profile: onnxruntime writes which operators ran to a file whose name begins so, when the model is closed; "" none.
    gpu: number of the GPU that the model runs on, None for the CPU. A runtime that has no such GPU raises
    RuntimeUnavailableError when it loads.
    """

    threads: int = 0
    spin: Spin = "run"
    profile: str = ""
    kv_cache: str = ""
    gpu: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= MAX_THREADS:
            raise UsageError(f"threads must be between 0 (all physical cores) and {MAX_THREADS}, got {self.threads}")
        if self.spin not in _SPIN_ENTRIES:
            raise UsageError(f"spin must be one of {', '.join(_SPIN_ENTRIES)}, got {self.spin!r}")
        if self.kv_cache not in ("", *KV_CACHES):
            raise UsageError(f"the KV cache can be {' or '.join(KV_CACHES)}, got {self.kv_cache!r}")
        if self.gpu is not None and not 0 <= self.gpu <= MAX_GPU:
            raise UsageError(f"a GPU is named by its number, 0 to {MAX_GPU}, got {self.gpu}")

    def thread_count(self) -> int:
        return self.threads or physical_cores()

    def config_entries(self) -> dict[str, str]:
        """Session config entries, by onnxruntime's names."""
        return {"session.inter_op.allow_spinning": "0", **_SPIN_ENTRIES[self.spin]}


def refuse_kv_cache(options: RuntimeOptions | None, runtime: str) -> None:
    """For runtimes whose files decide. Raises UsageError."""
    if options is not None and options.kv_cache:
        raise UsageError(
            f"KV cache {options.kv_cache}: {runtime} keeps keys and values in the type that its graph states, if any; "
            "only GGUF artifacts let one choose when they are opened"
        )


def physical_cores() -> int:
    """Physical cores that this process may run on; hyper-threads share one matrix unit, so they do not count."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if sys.platform == "linux":
        siblings = {_core_of(cpu) for cpu in allowed}
        return max(1, len(siblings))
    return max(1, len(allowed) or os.cpu_count() or 1)


def one_per_core(allowed: Iterable[int]) -> list[int]:
    """The first logical processor of each physical core, in order."""
    first: dict[str, int] = {}
    for cpu in sorted(allowed):
        first.setdefault(_core_of(cpu), cpu)
    return list(first.values())


def _core_of(cpu: int) -> str:
    """The hyper-threads that share `cpu`'s core, as the kernel lists them; the cpu itself where it does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip() or str(cpu)
    except OSError:
        return str(cpu)


def import_onnxruntime() -> Any:
    """The onnxruntime module with telemetry off. Raises RuntimeUnavailableError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeUnavailableError(f"onnxruntime cannot be imported ({error}); pip install onnxruntime") from error
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def import_genai() -> Any:
    """The onnxruntime_genai module with telemetry off. Raises RuntimeUnavailableError."""
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"onnxruntime-genai cannot be imported ({error}); pip install onnxruntime-genai"
        ) from error
    if hasattr(onnxruntime_genai, "disable_telemetry_events"):
        onnxruntime_genai.disable_telemetry_events()
    return onnxruntime_genai


def session_options(options: RuntimeOptions) -> onnxruntime.SessionOptions:
    """onnxruntime options: sequential, threads fixed, errors only in the log."""
    ort = import_onnxruntime()
    result = ort.SessionOptions()
    result.intra_op_num_threads = options.thread_count()
    result.inter_op_num_threads = 1
    result.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    result.log_severity_level = 3
    for key, value in options.config_entries().items():
        result.add_session_config_entry(key, value)
    if options.profile:
        result.enable_profiling = True
        result.profile_file_prefix = options.profile
    return result


def open_session(model: Path, options: RuntimeOptions) -> onnxruntime.InferenceSession:
    """A session on the CPU, or on the GPU that is asked for. onnxruntime by itself would leave that out with no more
    than a warning where its libraries are not found, and give the CPU every product that it has no CUDA kernel for.

    Raises CheckpointError for a file that onnxruntime refuses, RuntimeUnavailableError where products would not run on
    that GPU.
    """
    ort = import_onnxruntime()
    providers: list[Any] = ["CPUExecutionProvider"]
    settings = session_options(options)
    if options.gpu is not None:
        if _CUDA not in ort.get_available_providers():
            raise RuntimeUnavailableError("this onnxruntime has no CUDA; pip install onnxruntime-gpu in its place")
        providers.insert(0, (_CUDA, {"device_id": str(options.gpu)}))
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = ort.InferenceSession(str(model), settings, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime raises its own family of exceptions, none of them public
        raise CheckpointError(f"onnxruntime cannot load {model}: {error}") from error
    if options.gpu is not None:
        _require_on_gpu(session, model, options.gpu)
    return session


def _require_on_gpu(session: Any, model: Path, gpu: int) -> None:
    """Shapes may be computed on the CPU; whatever reads weights may not. Raises RuntimeUnavailableError."""
    if _CUDA not in session.get_providers():
        raise RuntimeUnavailableError(
            f"onnxruntime cannot start CUDA on GPU {gpu}; check the driver (nvidia-smi) and the CUDA and cuDNN "
            "libraries that this onnxruntime-gpu was built for"
        )
    if left := products_elsewhere(session, _CUDA):
        raise RuntimeUnavailableError(
            f"{model}: onnxruntime has no CUDA kernel for its {', '.join(left)}, and would compute them on the CPU"
        )


def products_elsewhere(session: Any, provider: str) -> list[str]:
    """Types of matrix products and attentions that another provider was given. The session must have been made with
    `session.record_ep_graph_assignment_info`.
    """
    given = [part for part in session.get_provider_graph_assignment_info() if part.ep_name != provider]
    return sorted({n.op_type for part in given for n in part.get_nodes() if _PRODUCTS.search(n.op_type)})


def genai_config(folder: Path, options: RuntimeOptions) -> Any:
    """onnxruntime-genai's Config of a folder with these options; it does not tell which nodes a GPU leaves to the CPU.
    Raises RuntimeUnavailableError where it was built without CUDA.
    """
    og = import_genai()
    config = og.Config(str(folder))
    config.overlay(json.dumps(genai_overlay(options)))
    if options.gpu is not None:
        if not og.is_cuda_available():
            raise RuntimeUnavailableError(
                "this onnxruntime-genai has no CUDA; pip install onnxruntime-genai-cuda in its place"
            )
        config.clear_providers()
        config.append_provider("cuda")
        config.set_provider_option("cuda", "device_id", str(options.gpu))
    return config


def genai_overlay(options: RuntimeOptions) -> dict[str, Any]:
    """The same for onnxruntime-genai, as an overlay of genai_config.json (unknown strings become config entries)."""
    session = {"intra_op_num_threads": options.thread_count(), "inter_op_num_threads": 1, **options.config_entries()}
    if options.profile:
        session["enable_profiling"] = options.profile
    return {"model": {"decoder": {"session_options": session}}}
