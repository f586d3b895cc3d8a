"""`edgec advise`: the whole decision for one model, target and budget, with every number that it used.

Stands beside `assess`, above the pipeline, because the answer needs a profile, the planner, the bench and, when asked,
whole plans measured end to end. The judgement itself is `plan.advice` and `plan.verdict`; this file gathers what they
judge. Exporting every alternative and benching it was turned down as the default: it takes minutes where an estimate
takes seconds, and `edgec bench --json` followed by `--measured` is that path.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgec import modeling, pipeline
from edgec.bench import kernels, kernels_ggml
from edgec.checkpoint import read_json
from edgec.errors import CalibrationError, NumericsError, PlanError, UsageError
from edgec.evaluate.language import torch_logits
from edgec.export.gguf.stock import refuse_unsupported
from edgec.export.onnx.stack import write_stack
from edgec.export.targets import get_target, offered
from edgec.modeling import DECODER_TASK, Layer
from edgec.plan import advice, hardware, verdict
from edgec.plan.advice import Advice, Alternative, Desk, Limits
from edgec.plan.budget import parse_budget, parse_time
from edgec.plan.costs import Costs, Facts, Ram, Rate, parameters_that_fit
from edgec.plan.kv_cache import CacheShape, Memory, kv_bytes
from edgec.plan.planner import Sizes, constrained_plan
from edgec.quantize.formats import CoreFormat
from edgec.records import Target
from edgec.runtime.interfaces import CAUSAL_LM, ENCODER
from edgec.workspace import Workspace

_LM_CONTEXT, _SENTENCE = 2048, 32
"""Tokens when --context is not given: of a conversation (or all that the model takes), and of a sentence."""

_NODE_BYTES, _NODES_PER_BLOCK = 420, 40
"""First guess of the graph beside the tensors [bytes per node], as the exporter makes it before it writes the file."""

_CHUNKS = {"gguf": 512, "gguf_adapter": 512, "gguf_factored": 128}
"""Most tokens that llama.cpp, and edgec's ggml runtime, read at once, by artifact [tokens]; onnxruntime reads all."""

_ITEMS, _ITEM_CHARACTERS = 200, 400
"""Held-out text that causal LMs of different tokenizers are compared on: items, and characters of each."""

_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True)
class AdviceRequest:
    """What `edgec advise` was asked. context, threads 0: the default. measured: JSON of `edgec bench --json`."""

    model: Path
    target: str
    ram: str
    latency: str | None = None
    max_loss: str = "1%"
    context: int = 0
    batch: int = 1
    threads: int = 0
    profile: Path | None = None
    calibration: Path | None = None
    smaller: Path | None = None
    measured: Path | None = None
    measure: bool = False
    host_ram: str | None = None
    pooled_ram: str | None = None


def parse_ram(text: str, option: str = "--ram") -> float:
    """Bytes of "2GB" or "512MB". Raises UsageError."""
    try:
        budget = parse_budget(text)
    except UsageError:
        budget = None
    if budget is None or budget.kind != "size":
        raise UsageError(f"{option} {text!r}: expected a size, for example 512MB, 2GB or 1.5GiB")
    return budget.value


def parse_loss(text: str, task: str) -> float:
    """The acceptance line in the planner's unit: 1 − cosine, or the KL that a relative perplexity increase is.
    Raises UsageError.
    """
    match = _SHARE.fullmatch(text.strip())
    share = float(match[1]) / 100 if match else 0.0
    if not 0 < share <= 1:
        raise UsageError(f"--max-loss {text!r}: expected a percentage in (0, 100], for example 1% or 2.5%")
    return math.log1p(share) if task == DECODER_TASK else share


def advise(request: AdviceRequest, progress: pipeline.Progress) -> Advice:
    """The four nodes and the verdict. Cheap refusals come first, then the profile, then the machine's measurements."""
    ram, target = parse_ram(request.ram), get_target(request.target)
    host = parse_ram(request.host_ram, "--host-ram") if request.host_ram is not None else 0.0
    pooled = parse_ram(request.pooled_ram, "--pooled-ram") if request.pooled_ram is not None else 0.0
    latency = parse_time(request.latency, "--latency") if request.latency is not None else None
    row = hardware.of_target(target)
    workspace = Workspace(request.model, request.calibration)
    if target.gguf:
        refuse_unsupported(workspace.checkpoint, workspace.task)
    target = offered(target, encoder=workspace.task != DECODER_TASK)
    limits = Limits(ram, latency, parse_loss(request.max_loss, workspace.task), request.max_loss)
    facts = facts_of(workspace, request)
    rows = read_measured(request.measured, workspace.task, row) if request.measured is not None else []
    other = _smaller_workspace(request, workspace)
    found = pipeline.profile_of(workspace, target, request.profile, progress)
    progress("measuring the runtime", 0, 1)
    costs = measure_costs(facts, workspace.layers, target, row, request.threads)
    progress("measuring the runtime", 1, 1)
    evaluate = pipeline.evaluator(workspace, found, workspace.divergence_on_search) if request.measure else None
    desk = Desk(found, workspace.layers, target, facts, costs, limits, 0.0, evaluate)
    relevance = bool(workspace.checkpoint.config.get("index_topk"))  # an indexer that scores tokens beforehand
    memory = Memory(desk.weights_left - _smallest(desk), host, pooled)
    cache = advice.cache_node(facts, row.kv, row.kv_source, memory, relevance)
    desk.kv = cache.decision.whole_bytes if cache.decision is not None else 0.0
    made = advice.alternatives(desk) + [desk.held(_from_row(measured, facts, desk.kv)) for measured in rows]
    language = None
    if other is not None:
        made.append(_smaller(other, request, target, desk))
        if facts.cache is not None:
            progress("comparing with the smaller model", 0, 1)
            language = compare_languages(workspace, other)
            progress("comparing with the smaller model", 1, 1)
    made.sort(key=lambda a: _ORDER.index(a.what))
    int8_parameters = parameters_that_fit(desk.weights_left, costs)
    unit = "KL from dense, nats per token" if facts.cache is not None else "1 − cosine to dense"
    unproven = ""
    if latency is not None and not costs.native:
        unproven = (
            f"latency is unproven: this machine is {costs.machine}, the target is {row.description}; bench an export "
            "there and give the result as --measured"
        )
    elif latency is not None and costs.busy and any(a.ms_from != "measured" and a.fits_latency is None for a in made):
        unproven = (
            f"latency is unproven: this machine was busy ({costs.load:.1f} runnable processes per core), so estimates "
            "of time are upper bounds; ask again when it is idle, or give --measured"
        )
    ground = verdict.Ground(
        limits,
        unit,
        desk.least_ram(found),
        int8_parameters,
        facts.parameters,
        language,
        unproven,
    )
    sizes = Sizes(facts.parameters, facts.other_bytes)
    return Advice(
        facts,
        target.name,
        costs,
        unit,
        advice.functional_node(found, target, sizes, limits.loss),
        advice.QuantizationNode(row, target.dense_formats, target.factored_formats),
        cache,
        advice.BudgetNode(limits, desk.weights_left, int8_parameters, tuple(made)),
        verdict.decide(made, ground),
    )


_ORDER = (advice.NOTHING, advice.QUANTIZATION, advice.PIPELINE, advice.SMALLER)


def facts_of(workspace: Workspace, request: AdviceRequest) -> Facts:
    """Counts of the model, without reading a weight. Raises UsageError for a context that the model does not take."""
    sizes = modeling.dimensions(workspace.checkpoint)
    decoder = workspace.task == DECODER_TASK
    context = request.context or min(workspace.context, _LM_CONTEXT if decoder else _SENTENCE)
    if not 1 <= context <= workspace.context:
        raise UsageError(f"--context {context}: {workspace.folder} takes 1 … {workspace.context} tokens")
    layers = workspace.layers
    planned = sum(a.shape[0] * a.shape[1] for a in layers if a.tied_to is None)
    parameters = {id(p): p.numel() for p in modeling.skeleton(workspace.checkpoint).parameters()}
    total = sum(parameters.values())
    target = get_target(request.target)
    graph = 0 if target.gguf else _NODE_BYTES * (_NODES_PER_BLOCK * sizes.layers + 4 * len(layers))
    return Facts(
        name=workspace.folder.resolve().name,
        task=workspace.task,
        parameters=total,
        cache=CacheShape(sizes.layers, sizes.kv_heads, sizes.head_dim) if decoder else None,
        width=sizes.hidden,
        widest=max((a.shape[0] for a in layers if a.role == "linear"), default=sizes.hidden),
        heads=sizes.heads,
        vocabulary=sizes.vocabulary if decoder else 0,
        context=context,
        batch=request.batch,
        other_bytes=4 * max(0, total - planned) + graph,
        chunk=_CHUNKS.get(target.artifact, 0),
    )


def measure_costs(facts: Facts, layers: Sequence[Layer], target: Target, row: hardware.Hardware, threads: int) -> Costs:
    """Rates of the runtime on this machine, at the model's commonest shape and as many rows as one step has."""
    linears = [a for a in layers if a.role == "linear"]
    if not linears:
        raise PlanError(f"{facts.name} has no block linears: there is nothing to advise on")
    shape = Counter(a.shape for a in linears).most_common(1)[0][0]
    weights = sum(a.shape[0] * a.shape[1] for a in layers if a.role != "embedding")
    rows = facts.batch if facts.cache is not None else facts.batch * facts.context
    firsts: dict[int, str] = {32: "fp32", 16: "fp16"}
    for name in target.dense_formats:
        firsts.setdefault(CoreFormat.parse(name).bits, name)
    named: list[str] = []
    if target.gguf:
        named = list(target.dense_formats)
        asked = list(dict.fromkeys((*firsts.values(), *named)))
        llama_cpp = target.artifact != "gguf_factored"
        told = kernels_ggml.measure(asked, shape, rows, mapped=llama_cpp, threads=threads)
    else:
        task = CAUSAL_LM if facts.cache is not None else ENCODER
        int8 = target.multiplies_in_int8(encoder=task == ENCODER)
        write = partial(write_stack, accuracy_level=target.accuracy_level, int8=int8)
        told = kernels.measure(task, list(firsts.values()), shape, weights, rows, write, threads)
    here = hardware.detect()
    rates = {name: Rate(rate.ns_per_weight, rate.overhead) for name, rate in told.rates.items()}
    return Costs(
        told.empty_rss_bytes,
        told.session_bytes,
        {bits: rates[name] for bits, name in firsts.items()},
        rows,
        next(iter(told.rates.values())).threads,
        f"{here.processor or 'CPU'} ({here.hardware.name})",
        hardware.runs_here(row),
        told.load,
        {name: rates[name] for name in named},
    )


def _smallest(desk: Desk) -> float:
    """Resident bytes of the smallest plan: what a cache must leave room for."""
    plans = list(desk.plans(desk.profile, capped=False))
    return min((sum(map(desk.costs.resident, p.choices)) + p.other_bytes for p in plans), default=0.0)


def read_measured(path: Path, task: str, row: hardware.Hardware) -> list[dict[str, Any]]:
    """Rows of `edgec bench --json` that were measured on the target's class of hardware. Raises UsageError."""
    body = read_json(path)
    try:
        system, found = str(body["machine"]["system"]).lower(), []
        for entry in body["measurements"]:
            if str(entry["device"]).startswith(("cuda", "vulkan")):
                raise UsageError(
                    f"--measured {path}: {entry['contestant']!r} was measured on a GPU, and no target is for one"
                )
            if entry["task"] != (CAUSAL_LM if task == DECODER_TASK else ENCODER):
                raise UsageError(f"--measured {path}: {entry['contestant']!r} is a {entry['task']}, MODEL is not")
            if entry["metrics"]:
                for name, metric in entry["metrics"].items():
                    least = 0.0 if name == "rss_growth_bytes" else math.ulp(0.0)  # memory may not grow at all
                    if not least <= metric["value"] < math.inf:
                        raise UsageError(f"--measured {path}: {entry['contestant']!r} holds a value that is no measure")
                quality, settings = entry["quality"], entry["settings"]
                seen = [settings.get("prompt_tokens", 0), settings.get("new_tokens", 0)]
                told = [entry["artifact_bytes"], entry.get("kv_cache_bytes", 0), *quality.values(), *seen]
                if not all(isinstance(number, int | float) and 0 <= number < math.inf for number in told):
                    raise UsageError(f"--measured {path}: {entry['contestant']!r} holds a value that is no measure")
                found.append(entry)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--measured {path}: not what `edgec bench --json` prints ({error!r})") from error
    machine = next((m for m in ("x86_64", "aarch64", "arm64") if m in system), "")
    if not machine or row.machine not in ("", machine.replace("arm64", "aarch64")):
        raise UsageError(
            f"--measured {path}: measured on {system or 'an unknown machine'}, the target is {row.description}; bench "
            "on the target's class of hardware"
        )
    return found


def _from_row(entry: dict[str, Any], facts: Facts, kv: float) -> Alternative:
    """A bench row as an alternative; a cache for more tokens than it was measured with is added."""
    metrics, quality, settings = entry["metrics"], entry["quality"], entry["settings"]
    lm = facts.cache is not None
    ms = None
    if lm and "decode_tok_s" in metrics:
        ms = 1e3 / metrics["decode_tok_s"]["value"]
    elif not lm and "item_ms" in metrics:
        ms = metrics["item_ms"]["value"]
    loss = quality.get("kl") if lm else (1 - quality["cosine"] if "cosine" in quality else None)
    peak = metrics["peak_rss_bytes"]["value"] if "peak_rss_bytes" in metrics else math.inf
    seen = float(settings.get("prompt_tokens", 0)) + float(settings.get("new_tokens", 0))
    more = 0.0
    if facts.cache is not None and seen:
        held = entry.get("kv_cache_bytes") or kv_bytes(facts.cache, int(seen), 1, "fp32")
        more = max(0.0, kv - float(held))
    name = str(entry["contestant"])
    what = advice.PIPELINE
    if name.startswith("dense"):
        what = advice.NOTHING if re.search(r"\bb?f(p|loat)?(16|32)\b", name) else advice.QUANTIZATION
    at = "" if lm else f"measured at batches of {settings.get('batch', '?')}"
    return Alternative(
        f"{name} (bench)",
        what,
        float(entry["artifact_bytes"]),
        Ram(0.0, peak, 0.0, more, 0.0, measured=True),
        ms,
        None if loss is None else float(loss),
        "measured",
        "measured",
        "measured",
        False,
        None,
        None,
        note=at,
    )


def _smaller_workspace(request: AdviceRequest, workspace: Workspace) -> Workspace | None:
    if request.smaller is None:
        return None
    other = Workspace(request.smaller, request.calibration)
    if other.task != workspace.task:
        raise UsageError(f"--smaller {request.smaller} does {other.task}, MODEL does {workspace.task}")
    return other


def _smaller(other: Workspace, request: AdviceRequest, target: Target, desk: Desk) -> Alternative:
    """The smaller model at int8 (or the target's best format), by the same arithmetic; its loss is not comparable."""
    facts = facts_of(other, replace(request, context=min(desk.facts.context, other.context)))
    plan = constrained_plan(
        f"dense:{target.dense_formats[0]}", other.layers, target, other.checkpoint.fingerprint, facts.other_bytes
    )
    kv = 0.0
    if facts.cache is not None:
        kv = kv_bytes(facts.cache, facts.context, facts.batch, hardware.of_target(target).kv[0])
    theirs = Desk(desk.profile, other.layers, target, facts, desk.costs, desk.limits, kv)
    judged = theirs.judge(plan, f"{facts.name} {target.dense_formats[0]}", advice.SMALLER)
    return replace(judged, loss=None, acceptable=None, note=f"{facts.parameters / 1e6:.3g} M parameters")


def compare_languages(workspace: Workspace, other: Workspace) -> verdict.Language:
    """Both dense models on the same held-out text, in bits per byte, which no tokenizer changes."""
    items = [item[:_ITEM_CHARACTERS] for item in workspace.text.split("validate").items][:_ITEMS]
    if not items:
        raise CalibrationError(f"{workspace.text.origin}: its validate split is empty; give more with --calibration")
    dense, tokens_per_byte = _bits_per_byte(workspace, items)
    smaller, _ = _bits_per_byte(other, items)
    return verdict.Language(dense, smaller, tokens_per_byte / math.log(2))


def _bits_per_byte(workspace: Workspace, items: Sequence[str]) -> tuple[float, float]:
    """Bits per byte of the items, and tokens per byte; each item stands alone after the model's start token."""
    tokenizer, logits = workspace.tokenizer, torch_logits(workspace.model)
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), 0)
    nats, tokens = 0.0, 0
    for item in items:
        ids = np.array([[start, *tokenizer(item, add_special_tokens=False)["input_ids"]]], dtype=np.int64)
        if ids.shape[1] > workspace.context:
            raise CalibrationError(
                f"{workspace.folder} takes {workspace.context} tokens, and {len(item)} characters of the text are "
                f"{ids.shape[1]}; give shorter items with --calibration"
            )
        likely = torch.from_numpy(logits(ids)[0, :-1]).double().log_softmax(-1)
        nats -= float(likely.gather(1, torch.from_numpy(ids[0, 1:, None])).sum())
        tokens += ids.shape[1] - 1
    size = sum(len(item.encode()) for item in items)
    if not math.isfinite(nats):
        raise NumericsError(f"{workspace.folder}: its logits on the held-out text are not finite")
    return nats / math.log(2) / size, tokens / size
