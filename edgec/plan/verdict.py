"""The last word of the decision: deploy, go back, or buy a smaller model, in one sentence, with what it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgec.plan.advice import (
    BEST_HEALING,
    BUY_SMALLER,
    DEPLOY,
    GO_BACK,
    NOTHING,
    PIPELINE,
    QUANTIZATION,
    SMALLER,
    Alternative,
    Limits,
    Verdict,
)


@dataclass(frozen=True)
class Language:
    """What makes causal LMs of different tokenizers comparable: bits per byte of the same held-out text.

    dense, smaller: of this model and of the smaller one, dense fp32. per_nat: bits per byte that one nat per token is.
    """

    dense: float
    smaller: float
    per_nat: float


@dataclass(frozen=True)
class Ground:
    """What a verdict is made from besides the alternatives. least_ram: memory at which a predicted loss is within the
    line [bytes]. int8_parameters: size of a dense model that the memory holds at int8. unproven: why times are unknown.
    """

    limits: Limits
    unit: str
    least_ram: float | None
    int8_parameters: int
    parameters: int
    language: Language | None = None
    unproven: str = ""


def decide(found: Sequence[Alternative], ground: Ground) -> Verdict:
    """found: in the order of preference, simplest first."""
    own = [a for a in found if a.what != SMALLER]
    smaller = next((a for a in found if a.what == SMALLER), None)
    numbers = [_compared(own, ground)]
    best = _simplest(own)
    rival = _rival(smaller, best, ground)
    if rival:
        numbers.append(rival[1])
    if best is None:
        verdict = _nothing_fits(own, smaller, ground)
    elif rival and rival[0] and smaller is not None and smaller.fits_ram and smaller.fits_latency is not False:
        verdict = Verdict(
            BUY_SMALLER,
            f"Buy the smaller model: {smaller.name} fits and predicts the same text at least as well.",
            (),
        )
    else:
        verdict = Verdict(DEPLOY, _deploy(best, own, ground), ())
    if ground.unproven:
        numbers.append(ground.unproven)
    return Verdict(verdict.decision, verdict.sentence, tuple(n for n in (*verdict.numbers, *numbers) if n))


def _simplest(own: Sequence[Alternative]) -> Alternative | None:
    """The first viable one, but a measured row over an estimate of the same kind."""
    viable = [a for a in own if a.viable]
    if not viable:
        return None
    same = [a for a in viable if a.what == viable[0].what]
    return next((a for a in same if a.ram_from == "measured"), same[0])


def _deploy(best: Alternative, own: Sequence[Alternative], ground: Ground) -> str:
    numbers = f"{_mb(best.ram.total)} of {_mb(ground.limits.ram)}"
    if best.ms is not None:
        numbers += f", {best.ms:.3g} ms"
    if best.loss is not None:
        numbers += f", {best.loss_from} loss {best.loss:.2g}"
    match best.what:
        case "nothing":
            cheaper = next((a for a in own if a.what == QUANTIZATION and a.viable), None)
            saving = (
                f"; {cheaper.name} would save {_mb(best.ram.total - cheaper.ram.total)} of memory and "
                f"{_mb(best.bytes - cheaper.bytes)} of file for a loss of {cheaper.loss:.2g}"
                if cheaper is not None and cheaper.loss is not None and cheaper.ram.total < best.ram.total
                else ""
            )
            return f"Deploy it as it is: {best.name} keeps every limit ({numbers}){saving}."
        case "quantization only":
            return f"Deploy with plain quantization: {best.name} keeps every limit ({numbers}); no need to factor."
        case _ if not best.factored and best.ram_from != "measured":
            return f"Deploy edgec's plan: it keeps every limit ({numbers}), and it factors no layer."
        case _:
            return f"Deploy edgec's plan: {best.name} keeps every limit ({numbers}); nothing simpler does."


def _nothing_fits(own: Sequence[Alternative], smaller: Alternative | None, ground: Ground) -> Verdict:
    limits = ground.limits
    small = f"a dense model of at most {_count(ground.int8_parameters)} parameters fits at int8"
    if smaller is not None:
        fits = smaller.fits_ram and smaller.fits_latency is not False
        small = f"{smaller.name} {'fits' if fits else 'does not fit either'}; {small}"
    fitting = [a for a in own if a.what != NOTHING and a.fits_ram and a.fits_latency is not False]
    if not fitting:
        least = min(own, key=lambda a: a.ram.total)
        why = (
            f"{_mb(least.ram.total)} at least, {_mb(limits.ram)} given"
            if not least.fits_ram
            else f"the smallest form takes {least.ms:.3g} ms, {limits.latency_ms:g} ms given"
        )
        return Verdict(BUY_SMALLER, f"Buy a smaller model: no form of this one fits ({why}).", (small,))
    scored = [a for a in fitting if a.loss is not None]
    if not scored:
        return Verdict(GO_BACK, "Go back: what fits was never scored; profile the model for this target first.", ())
    best = min(scored, key=lambda a: a.loss or 0.0)
    loss = best.loss or 0.0
    told = f"the best that fits, {best.name}, loses {loss:.2g} ({best.loss_from}), the line is {limits.loss:.2g}"
    ways = [f"raise --ram to {_mb(1.02 * ground.least_ram)}"] if ground.least_ram is not None else []
    healed = (1 - BEST_HEALING) * loss
    if healed <= limits.loss:
        share = 100 * BEST_HEALING
        ways.append(f"heal (at best {share:.0f} % of a loss has come back, which would leave {healed:.2g})")
    if not ways or (len(ways) == 1 and healed > limits.loss and ground.parameters > 4 * ground.int8_parameters):
        return Verdict(BUY_SMALLER, f"Buy a smaller model: {told}, and healing cannot make up for that.", (small,))
    return Verdict(GO_BACK, f"Go back: {told}; {' or '.join(ways)}.", (small,))


def _compared(own: Sequence[Alternative], ground: Ground) -> str:
    """Does factoring buy anything at the budget that fits? Said in any case, also when it does not matter."""
    mixed = next((a for a in own if a.what == QUANTIZATION and a.name == "dense, bits by layer"), None)
    full = next((a for a in own if a.what == PIPELINE and a.ram_from != "measured"), None)
    if mixed is None or full is None or mixed.loss is None or full.loss is None:
        return ""
    if not all(a.fits_ram and a.fits_latency is not False for a in (mixed, full)):
        least, most = _mb(full.ram.total), _mb(mixed.ram.total)
        return f"at their smallest, quantization alone needs {most}, with factoring {least}"
    pair = f"loss {full.loss:.2g} against {mixed.loss:.2g} ({full.loss_from}, {ground.unit})"
    if not full.factored:
        return f"the search over both kinds factors no layer here: quantization alone is the better buy ({pair})"
    gain = mixed.loss - full.loss
    if not gain > 0.02 * max(mixed.loss, 1e-12):
        return f"{full.factored} factored layers bring nothing over quantization alone: {pair}"
    return f"factoring {full.factored} layers is better than quantization alone at the same limits: {pair}"


def _rival(smaller: Alternative | None, best: Alternative | None, ground: Ground) -> tuple[bool, str] | None:
    """Is the smaller model at least as good? And the numbers that say so."""
    if smaller is None:
        return None
    if ground.language is None:
        return False, (
            f"{smaller.name} needs {_mb(smaller.ram.total)}: embeddings of two encoders cannot be compared without "
            "labelled pairs (`edgec eval --sts`), so its quality is for you to judge"
        )
    told = ground.language
    ours = told.dense + told.per_nat * ((best.loss if best is not None else 0.0) or 0.0)
    text = (
        f"bits per byte of the same text, measured: this model dense {told.dense:.4f}"
        + (f", {best.name} {ours:.4f} (its loss added)" if best is not None and best.loss else "")
        + f", {smaller.name} before quantization {told.smaller:.4f}"
    )
    return told.smaller <= ours, text


def _mb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _count(parameters: float) -> str:
    for unit, scale in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if parameters >= scale:
            return f"{parameters / scale:.3g} {unit}"
    return f"{parameters:.0f}"
