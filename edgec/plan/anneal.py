"""Simulated annealing from the refined plan: slower, wider, and kept only if a second text agrees.

A state is one number per layer, by which its corrected losses are tilted before they are allocated (Kirkpatrick et al.
1983 for the schedule). Every state is therefore a plan that spends the whole budget. Swapping the choices of two
layers directly was turned down: most swaps break the budget or leave bytes unspent.

A search that measures a hundred plans on one text also fits that text; hence the second one, which has the last word.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

from edgec.plan.corrections import Groups, learn
from edgec.plan.offer import Offer
from edgec.plan.refine import Evaluate, Found, Ledger, Progress, Search
from edgec.records import Choice

_HOT, _COLD = 0.02, 0.001
"""First and last temperature, as relative increase of the loss that is accepted with probability 1/e."""
_STEP = 0.5
"""Standard deviation of one layer's tilt in one move [nats]."""
_MOVED = 3
"""Layers that one move tilts."""
_BARREN = 50
"""Moves in a row that lead to a plan already measured before the search gives up."""


def anneal(
    offer: Offer,
    start: Found,
    ledger: Ledger,
    search: Search,
    confirm: Evaluate,
    progress: Progress | None = None,
) -> tuple[Found, str]:
    """(the better plan by `confirm`, a sentence on what happened). Measures at most `search.evaluations` more plans
    for at most `search.seconds` more; same seed, same plans, unless the time limit cuts them off.
    """
    rng = random.Random(search.seed)  # noqa: S311 (a search, not a secret)
    corrections = learn(Groups.of_layers(list(offer.choices)), ledger.records)
    layers = sorted(offer.choices)
    tilts = dict.fromkeys(layers, 0.0)
    here, best, best_loss = start.loss, start.choices, start.loss
    first, begun, barren = ledger.count, ledger.seconds, 0
    while barren < _BARREN:
        share = search.share(ledger.count - first, ledger.seconds - begun)
        if share >= 1:
            break
        moved = dict(tilts)
        for layer in rng.sample(layers, min(_MOVED, len(layers))):
            moved[layer] += rng.gauss(0.0, _STEP)

        def tilted(choice: Choice, moved: dict[str, float] = moved) -> float:
            return corrections(choice) * math.exp(moved[choice.layer])

        plan = offer.allocate(tilted)
        barren = barren + 1 if ledger.knows(plan) else 0
        loss = ledger.measure(plan)
        temperature = _HOT * (_COLD / _HOT) ** share
        worse = math.log(loss / here) if here > 0 and 0 < loss < math.inf else (0.0 if loss <= here else math.inf)
        if rng.random() < math.exp(min(0.0, -worse / temperature)):
            tilts, here = moved, loss
        if loss < best_loss and offer.fits(plan):
            best, best_loss = plan, loss
        if progress:
            progress(round(share * search.evaluations), search.evaluations, best_loss)
    tried = ledger.count - first
    if best_loss >= start.loss:
        return start, f"annealing: {tried} plans measured (seed {search.seed}), none better than the refined one"
    before, after = confirm(start.choices), confirm(best)
    told = f"annealing: {tried} plans measured (seed {search.seed}), {start.loss:.3g} to {best_loss:.3g}; on a second "
    if not after < before:
        return start, told + f"text {before:.3g} to {after:.3g}, so it was discarded"
    found = replace(start, name="annealed", choices=best, loss=best_loss, evaluations=start.evaluations + tried)
    return found, told + f"text {before:.3g} to {after:.3g}, so it was kept"
