"""The decision as people read it: one table of at most 100 columns per node, its arithmetic below, the verdict last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console

from edgec.console import line, printable, safe, size, table
from edgec.plan.advice import Advice, Alternative
from edgec.plan.kv_cache import arithmetic, kv_bytes
from edgec.records import as_dict


def advice_summary(found: Advice) -> dict[str, Any]:
    """What `advise --json` prints: every record, with the sums that are properties."""
    body = as_dict(found)
    for shown, alternative in zip(body["budget"]["alternatives"], found.budget.alternatives, strict=True):
        shown["ram"]["total"] = alternative.ram.total
        shown["viable"] = alternative.viable
    return body


def print_advice(out: Console, found: Advice) -> None:
    facts, limits = found.facts, found.budget.limits
    asked = f"{size(limits.ram)} of memory"
    if limits.latency_ms is not None:
        asked += f", {limits.latency_ms:g} ms per {'token' if facts.cache else 'sentence'}"
    line(out, f"{facts.name}: {_count(facts.parameters)} parameters, for {found.target}, {asked}")
    _note(
        out,
        f"acceptance line: a loss of {limits.loss_text} = {limits.loss:.4g} ({found.unit}); "
        f"{facts.context} tokens, batch {facts.batch}",
    )
    _functional(out, found)
    _quantization(out, found)
    _cache(out, found)
    _budget(out, found)
    line(out, "")
    line(out, f"VERDICT: {found.verdict.decision.upper()}")
    line(out, found.verdict.sentence)
    for text in found.verdict.numbers:
        line(out, f"  · {text}")


def _functional(out: Console, found: Advice) -> None:
    node = found.functional
    columns = (">linear bpw", "forms of the block linears", ">functional error", ">predicted loss", "")
    shown = table(*columns, title="1  functional error")
    for level in node.levels:
        if level.kinds is None or level.reached is None:
            shown.add_row(f"{level.bpw:g}", "even the smallest forms need more", "–", "–", "")
            continue
        forms = ", ".join(f"{100 * n / node.linears:.0f} % {kind}" for kind, n in level.kinds.items())
        good = level.loss is not None and level.loss <= found.budget.limits.loss
        shown.add_row(
            f"{level.bpw:g}",
            safe(forms),
            "–" if level.error is None else f"{level.error:.3f}",
            "–" if level.loss is None else f"{level.loss:.2g}",
            "within the line" if good else "",
        )
    out.print(shown)
    _note(
        out,
        f"{node.linears} block linears, {node.incompressible} with the spectrum of a random matrix; dense = plain "
        f"quantization; embeddings at int8; loss in {found.unit}, predicted",
    )


def _quantization(out: Console, found: Advice) -> None:
    node = found.quantization
    shown = table("format", "fast", "why", "source", title=f"2  quantization by hardware: {node.hardware.description}")
    sources = list(dict.fromkeys(support.source for support in node.hardware.supports))
    for support in node.hardware.supports:
        blocks = f" (blocks {', '.join(map(str, support.blocks))})" if support.blocks else ""
        shown.add_row(
            support.family, support.verdict, safe(support.why + blocks), f"({sources.index(support.source) + 1})"
        )
    out.print(shown)
    for number, source in enumerate(sources, start=1):
        _note(out, f"({number}) {source}")
    _note(out, f"{found.target} offers dense: {', '.join(node.dense)}; factored: {', '.join(node.factored) or 'none'}")


def _cache(out: Console, found: Advice) -> None:
    node, shape = found.cache, found.facts.cache
    if node.decision is None or shape is None:
        line(out, "3  KV cache")
        line(out, f"   {node.note}")
        line(out, "")
        return
    facts, decision = found.facts, node.decision
    shown = table("placement", "type", ">near", ">elsewhere", ">link per step", "", title="3  KV cache")
    for option in decision.options:
        chosen = (option.placement, option.precision) == (decision.placement, decision.precision)
        verdict = "chosen" if chosen else "" if option.fits else "does not fit"
        if not option.runs:
            verdict = "edgec does not write it"
        shown.add_row(
            option.placement,
            option.precision,
            size(option.near),
            size(option.far) if option.far else "–",
            "–" if option.link_ms is None else f"{option.link_ms:.3g} ms",
            verdict,
        )
    out.print(shown)
    for precision in dict.fromkeys(option.precision for option in decision.options):
        product = arithmetic(shape, facts.context, facts.batch, precision)
        _note(out, f"{product} = {size(kv_bytes(shape, facts.context, facts.batch, precision))}")
    for reason in (*decision.reasons, node.note):
        _note(out, reason)


def _budget(out: Console, found: Advice) -> None:
    step = "token" if found.facts.cache else "sentence"
    shown = table("", ">model", ">memory", f">ms per {step}", ">loss", "within the limits", title="4  memory and time")
    for alternative in found.budget.alternatives:
        shown.add_row(
            safe(alternative.name),
            size(alternative.bytes),
            size(alternative.ram.total),
            _time(alternative, busy=found.costs.busy),
            "–" if alternative.loss is None else f"{alternative.loss:.2g}",
            _judgement(alternative),
        )
    out.print(shown)
    for alternative in found.budget.alternatives:
        _note(out, f"{alternative.name}: {'; '.join(_sum(alternative))}")
    costs, named = found.costs, found.costs.named
    by_bits = sorted(costs.rates.items(), reverse=True)
    shown_rates = {f"{bits} bits": rate for bits, rate in by_bits if bits > 8 or not named} | dict(named)
    rates = ", ".join(
        f"{what} {rate.ns:.3g} ns and {rate.overhead:.2f} resident bytes a byte" for what, rate in shown_rates.items()
    )
    _note(
        out,
        f"estimates from kernels measured just now on {costs.machine}, {costs.threads} threads, {costs.rows} rows a "
        f"step: per weight {rates}. Attention, norms and tokenization are not in the times; the losses are without "
        "what kernels lose by rounding activations to 8 bits, and what an export's last fit, block by block, wins back",
    )
    if costs.busy:
        _note(out, f"this machine was busy ({costs.load:.1f} processes per core): its times are upper bounds")
    left = found.budget.weights_left
    _note(
        out,
        f"{size(left)} are left for weights: a dense int8 model of {_count(found.budget.int8_parameters)} parameters",
    )


def _time(found: Alternative, *, busy: bool) -> str:
    if found.ms is None:
        return "–"
    return ("≤ " if busy and found.ms_from != "measured" else "") + f"{found.ms:.3g}"


def _judgement(found: Alternative) -> str:
    """ "yes", or which limits it breaks."""
    verdicts = {"memory": found.fits_ram, "time": found.fits_latency, "loss": found.acceptable}
    broken = [name for name, kept in verdicts.items() if kept is False]
    if broken:
        return "no: " + ", ".join(broken)
    return "yes" if found.acceptable is not None else "loss unknown"


def _note(out: Console, text: str) -> None:
    """A dim paragraph within the tables' width."""
    out.print(printable(text), style="dim", markup=False, highlight=False, width=min(out.width, 100))


def _sum(found: Alternative) -> Iterator[str]:
    """Where an alternative's numbers come from."""
    ram = found.ram
    if ram.measured:
        more = f" + {size(ram.kv)} for the longer KV cache" if ram.kv else ""
        yield f"peak RSS {size(ram.weights)}{more}, all measured by edgec bench"
    else:
        beyond = f" + {size(ram.extra)} packing" if ram.extra >= 0 else f" − {size(-ram.extra)} never resident"
        yield (
            f"{size(ram.runtime)} runtime + {size(ram.weights)} weights{beyond} + {size(ram.kv)} KV + "
            f"{size(ram.activations)} activations ({found.ram_from})"
        )
        if found.loss is not None:
            yield f"loss {found.loss_from}"
    if found.factored:
        yield f"{found.factored} layers factored"
    if found.note:
        yield found.note


def _count(parameters: float) -> str:
    return f"{parameters / 1e9:.2f} G" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"
