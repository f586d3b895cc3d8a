"""`edgec export`: every stage in order, and nothing is called done before it was verified."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgec import healing, outputs
from edgec.checkpoint import Checkpoint
from edgec.compress import store
from edgec.compress.overlay import write_overlay
from edgec.errors import BudgetError, PlanError, UsageError, VerificationError
from edgec.export.artifacts import ArtifactKind, Written, kind_of
from edgec.export.targets import get_target, offered
from edgec.fit import Factors
from edgec.modeling import DECODER_TASK
from edgec.pipeline.from_compressed import from_compressed, reconstructed_folder, ships_as_it_is
from edgec.pipeline.pace import paced
from edgec.pipeline.refit import fit_from_profile, refitted
from edgec.pipeline.request import ExportRequest, goal_of, refuse_int8, target_of
from edgec.pipeline.stages import (
    Goal,
    Progress,
    evaluator,
    explicit_plan,
    fit_drafts,
    fit_plan,
    manifest_bytes,
    planning_sizes,
    profile_of,
    search_plan,
    silent,
)
from edgec.pipeline.verified import Product, shipped_loss, verified_manifest
from edgec.plan.acceptance import Line
from edgec.plan.budget import Budget
from edgec.plan.planner import Sizes, finalists, plan_of
from edgec.plan.refine import Evaluate, key_of
from edgec.profile.store import Profile
from edgec.records import MANIFEST_NAME, Plan, Target
from edgec.workspace import Workspace

logger = logging.getLogger(__name__)

_REPLANS = 4
"""How often a plan is made again with a better estimate of what ships beside it, or of what its runtime loses."""
_TIGHTER = 0.97
"""Share of what is left of a line that the next plan may lose: its rounding may be a little more."""
_HEAT_SHARE = 0.12
"""Share of the healing that each finalist gets before the best goes on alone."""
_FINALISTS = 3


@dataclass(frozen=True)
class Exported:
    """What came out: the folder, its plan, its manifest."""

    out: Path
    plan: Plan
    manifest: Mapping[str, Any]


class _Export:
    """One export under way."""

    def __init__(self, request: ExportRequest, target: Target, stage: Path, work: Path, progress: Progress) -> None:
        self.request, self.stage, self.work, self.progress = request, stage, work, progress
        self.workspace = Workspace(request.model, request.calibration)
        self.target = offered(target, encoder=self.workspace.task != DECODER_TASK)
        self.kind = kind_of(target)

    def run(self, goal: Goal) -> Product:
        request, workspace = self.request, self.workspace
        refuse_int8(request, workspace)
        self.kind.refuse_unsupported(workspace.checkpoint, workspace.task)
        workspace.require_finite()
        if request.plan is not None:
            made = explicit_plan(workspace, request.plan, request.target)
            factors: Mapping[str, Factors]
            if request.profile is None:
                factors = fit_plan(workspace, made, request.plain, self.progress)
            else:
                factors, note = fit_from_profile(workspace, made, request.profile, self.progress)
                made = _noted(made, note)
            return self._healed(self._written(made, factors, workspace.checkpoint), None, [])
        return self._planned(goal)

    def _planned(self, goal: Goal) -> Product:
        """Plan, fit and write until what was really written is within the budget or the line; then heal."""
        workspace = self.workspace
        goal = paced(goal, self.target, workspace.task, self.progress)
        self.progress("building the graph", 0, 1)
        draft = self.kind.prepare(workspace.checkpoint, workspace.task, self.work)
        self.progress("building the graph", 1, 1)
        sizes = planning_sizes(workspace, self.kind, draft, self.work)
        found = profile_of(workspace, self.target, self.request.profile, self.progress)
        evaluate = evaluator(workspace, found, workspace.divergence_on_search)
        product, rivals = self._within_budget(goal, found, sizes, evaluate, draft)
        if goal.line is None:
            return self._healed(product, found, rivals, goal.budget)
        product, lost = self._within_line(
            product, goal, goal.line, lambda tighter: self._within_budget(tighter, found, sizes, evaluate)[0]
        )
        healed = self._healed(product, found, rivals)
        if healed is not product:  # healing is judged in floats
            after = shipped_loss(workspace, self.stage)
            if after <= goal.line.value:
                product, lost = healed, after
            else:
                logger.warning("healed, the written files lose %.3g, more than %s; they ship as they were", after, goal)
                product = self._written(product.plan, product.factors, product.source)
        return replace(product, plan=_noted(product.plan, f"the written files lose {lost:.3g}"))

    def _within_budget(
        self, goal: Goal, found: Profile, sizes: Sizes, evaluate: Evaluate, draft: Any = None
    ) -> tuple[Product, list[Plan]]:
        """A product, and plans of another structure for healing to try. Raises BudgetError."""
        over = 0.0
        for attempt in range(_REPLANS):
            plans = self._plans(found, goal, sizes, evaluate)
            factors = fit_drafts(self.workspace, plans[0].choices, found, self.progress)
            product = self._written(plans[0], factors, self.workspace.checkpoint, draft)
            draft = None  # writing consumes it
            over = self._overrun(goal.budget, product.written)
            if over <= 0:
                product = self._refitted(product, found, goal.budget)
                if goal.line is not None:
                    product = self._smaller(product, goal, goal.line, found, sizes, evaluate)
                return product, plans[1:]
            logger.info("the written model is %d bytes over the budget; planning again", over)
            # Another plan has another graph around its layers, some kB larger: room is given up faster and faster.
            sizes = replace(sizes, other_bytes=sizes.other_bytes + (int(over) + 64) * 2**attempt)
        raise BudgetError(
            f"budget {goal}: no plan fits after {_REPLANS} tries; the last was {over:.0f} bytes over. Raise --budget"
        )

    def _within_line(
        self, product: Product, goal: Goal, line: Line, made: Callable[[Goal], Product]
    ) -> tuple[Product, float]:
        """A product whose files, run by their own runtime, lose no more than the line, and what they lose: plans are
        compared in floats, and a runtime that rounds activations loses more. Raises BudgetError.
        """
        int8 = self.target.multiplies_in_int8(encoder=self.workspace.task != DECODER_TASK)
        packed = " or take --arithmetic packed" if int8 else ""
        aim = line.value
        for tries in range(_REPLANS + 1):
            if (lost := shipped_loss(self.workspace, self.stage)) <= line.value:
                return product, lost
            rounding = lost - self.workspace.loss_with(product.factors, self.workspace.accepted_loss)
            problem = f"{goal}: rounding in the runtime costs {rounding:.3g}, and no plan loses the rest or less"
            aim = _TIGHTER * min(aim, line.value - rounding)
            if tries == _REPLANS or aim <= 0:
                break
            logger.info("run by its runtime the plan loses %.3g, %.3g is allowed; planning again", lost, line.value)
            try:
                product = made(replace(goal, line=replace(line, value=aim)))
            except PlanError as error:
                raise BudgetError(f"{problem}; raise it{packed}") from error
        raise BudgetError(f"{problem}; raise it{packed}")

    def _plans(self, found: Profile, goal: Goal, sizes: Sizes, evaluate: Evaluate) -> list[Plan]:
        """The best plan, and where healing follows, others of another structure: healing may reverse their order."""
        made = search_plan(self.workspace, found, self.target, goal, sizes, self.progress, evaluate)
        if self.target.must_beat:
            made = self._the_better(made, found, goal, sizes, evaluate)
        settings = self.request.heal
        if settings.mode == "off" or goal.budget is None:
            return [made]
        if settings.mode == "auto" and evaluate(list(made.choices)) < healing.NOTHING_TO_HEAL:
            return [made]
        entries = finalists(found, self.target, goal.budget, sizes, evaluate, goal.search, pace=goal.pace)
        known = key_of(made.choices)
        others = [(name, choices, loss) for name, choices, loss in entries if key_of(choices) != known]
        told = [f"measured loss of the {name} finalist: {loss:.3g}" for name, _, loss in others]
        return [made] + [
            plan_of(found, self.target, str(goal), sizes, choices, [note])
            for note, (_, choices, _) in zip(told, others[: _FINALISTS - 1], strict=False)
        ]

    def _the_better(self, made: Plan, found: Profile, goal: Goal, sizes: Sizes, evaluate: Evaluate) -> Plan:
        """The plan, or the simpler target's at the same budget where that one measures as well."""
        if all(choice.spec.quantization_only for choice in made.choices):
            note = "no correction is worth its bytes here: the plain file ships, without an adapter"
        else:
            simple = get_target(self.target.must_beat)
            plain = search_plan(self.workspace, found, simple, goal, sizes, self.progress, evaluate)
            if goal.budget is None:
                ours, theirs = float(made.bytes), float(plain.bytes)
                told = f"{ours:.0f} bytes for the loss asked for, {theirs:.0f} without corrections"
            else:
                ours, theirs = evaluate(list(made.choices)), evaluate(list(plain.choices))
                told = f"measured loss {ours:.4g}, {theirs:.4g} without corrections at the same budget"
            if ours < theirs:
                return replace(made, notes=(*made.notes, f"corrections pay: {told}"))
            made = replace(plain, target=self.target.name)
            note = f"corrections do not pay ({told}): the plain file ships, without an adapter"
        logger.warning("%s", note)
        return replace(made, notes=(*made.notes, note))

    def _written(self, plan: Plan, factors: Mapping[str, Factors], source: Checkpoint, draft: Any = None) -> Product:
        """draft: the source's dense graph, or what the kind has instead, where it is at hand; it is used up."""
        draft = draft or self.kind.prepare(source, self.workspace.task, self.work)
        written = _write(self.kind, source, draft, factors, self.target, self.stage, self.progress)
        return Product(plan, factors, written, source)

    def _refitted(self, product: Product, found: Profile, budget: Budget | None) -> Product:
        """The product with its factors fitted as they are to ship, where that is closer to the dense model."""
        factors, note = self._fitted(product.plan, found, product.factors)
        plan = _noted(product.plan, note)
        if factors is product.factors:
            return replace(product, plan=plan)
        made = self._written(plan, factors, product.source)
        if self._overrun(budget, made.written) > 0:
            logger.warning("fitted block by block the model is over the budget; it ships as it was before")
            return self._written(product.plan, product.factors, product.source)
        return made

    def _fitted(
        self, plan: Plan, found: Profile, drafts: Mapping[str, Factors] | None = None
    ) -> tuple[Mapping[str, Factors], str]:
        """A searched plan's factors as they ship, and what to note of them. drafts: the plan's, where at hand."""
        drafts = drafts or fit_drafts(self.workspace, plan.choices, found, silent)
        return refitted(self.workspace, plan.choices, drafts, found.statistics.moment, self.progress)

    def _smaller(
        self, product: Product, goal: Goal, line: Line, found: Profile, sizes: Sizes, evaluate: Evaluate
    ) -> Product:
        """A smaller product that fitting block by block brings below the line too, where there is one: the plan was
        searched for with factors that lose more.
        """
        workspace = self.workspace
        searched = fit_drafts(workspace, product.plan.choices, found, silent)
        before, after = (workspace.loss_with(f, workspace.accepted_loss) for f in (searched, product.factors))
        eased = line.value * before / max(after, 1e-12)
        if not line.value < eased < 1:
            return product
        plan = self._plans(found, replace(goal, line=replace(line, value=eased)), sizes, evaluate)[0]
        factors, _ = self._fitted(plan, found)
        loss = workspace.loss_with(factors, workspace.accepted_loss)
        if plan.bytes >= product.plan.bytes or not loss <= line.value:
            return product
        note = f"fitted block by block, a plan of {plan.bytes / product.plan.bytes:.0%} of the bytes loses {loss:.3g}"
        return self._written(_noted(plan, note), factors, product.source)

    def _healed(
        self, product: Product, found: Profile | None, rivals: Sequence[Plan], budget: Budget | None = None
    ) -> Product:
        """The product after healing, which is the product itself where healing is off or does not help."""
        settings = self.request.heal
        state_file = self.request.out.absolute().parent / f".{self.request.out.name}.heal.safetensors"
        if settings.mode == "off":
            state_file.unlink(missing_ok=True)  # of a run that was killed, and is not taken up again
            return product
        plan, start = product.plan, healing.Start(product.factors)
        if rivals and not healing.reason_to_skip(self.workspace, settings, product.factors):
            heats = [(plan, start)]
            for rival in rivals:
                assert found is not None
                heats.append((rival, healing.Start(self._fitted(rival, found)[0])))
            tried = []
            for number, (rival, entry) in enumerate(heats):
                heat = settings.shortened(_HEAT_SHARE)
                healed = healing.heal(
                    self.workspace, entry, heat, progress=self._told(f"healing finalist {number + 1}")
                )
                tried.append((healed.after, number, rival, healed))
            told = ", ".join(f"{healed.before:.3g} → {after:.3g}" for after, _, _, healed in tried)
            after, number, plan, best = min(tried, key=lambda entry: entry[:2])
            plan = replace(plan, notes=(*plan.notes, f"finalists, briefly healed: {told}; number {number + 1} goes on"))
            start, settings = (
                healing.Start(best.factors, best.vectors),
                settings.shortened(1 - _HEAT_SHARE * len(heats)),
            )
        healed = healing.heal(self.workspace, start, settings, state_file=state_file, progress=self._told("healing"))
        state_file.unlink(missing_ok=True)
        record = healed.record()
        plan = replace(plan, notes=(*plan.notes, healed.note))
        source = self.workspace.checkpoint
        if healed.vectors:
            source = write_overlay(source, healed.vectors, self.work / "healed")
        made = replace(self._written(plan, healed.factors, source), healing=record)
        if self._overrun(budget, made.written) > 0:
            logger.warning("the healed model is over the budget; it ships as it was before")
            return self._written(product.plan, product.factors, product.source)
        return made

    def _told(self, stage: str) -> healing.Progress:
        return lambda done, total: self.progress(stage, done, total)

    def _overrun(self, budget: Budget | None, written: Written) -> float:
        """Bytes that the written files are over the budget; negative when they are within it."""
        if budget is None:
            return -1.0
        companions = sum(f.stat().st_size for f in self.stage.rglob("*") if f.is_file()) - written.model_bytes
        files = companions + manifest_bytes(self.workspace)
        return written.model_bytes - budget.model_bytes(self.workspace.checkpoint.parameters, files)


def export(request: ExportRequest, progress: Progress = silent) -> Exported:
    """Everything: the folder that a runtime loads, verified, with its manifest; whole or not at all."""
    target = target_of(request)
    goal = goal_of(request, target)
    outputs.check_free(request.out, force=request.force)
    kind = kind_of(target)
    compressed = store.is_compressed(request.model)
    reconstructed = compressed and kind.RECONSTRUCTS and not ships_as_it_is(request.model, target)
    compressed = compressed and not reconstructed
    if compressed and any((request.plan, request.budget, request.max_loss, request.max_latency, request.profile)):
        raise UsageError(
            f"{request.model} is already compressed; --plan, --budget, --max-loss, --max-latency and --profile belong "
            "to the dense model"
        )
    if compressed and request.heal.mode not in ("off", "auto"):
        raise UsageError(
            f"{request.model} is already compressed and its dense original is not here to learn from; leave --heal out"
        )
    out = request.out
    with outputs.staged_folder(out, force=request.force) as stage, outputs.work_folder(out) as work:
        if compressed:
            request = replace(request, quality=False)  # its dense original is not here to compare with
            workspace, made, factors = from_compressed(request.model, request.out, request.calibration, target, work)
            refuse_int8(request, workspace)
            draft = kind.prepare(workspace.checkpoint, workspace.task, work)
            written = _write(kind, workspace.checkpoint, draft, factors, target, stage, progress)
            product = Product(made, factors, written, workspace.checkpoint)
        else:
            if reconstructed:
                request = replace(request, model=reconstructed_folder(request.model, target, work))
            run = _Export(request, target, stage, work, progress)
            workspace, product = run.workspace, run.run(goal)
        manifest = verified_manifest(
            workspace, product, target, stage, work, quality=request.quality, progress=progress
        )
        (stage / MANIFEST_NAME).write_text(_as_json(manifest), encoding="utf-8")
        if goal.budget is not None and product.plan.budget == str(goal.budget):
            _require_within(goal.budget, stage, product.written)
    return Exported(request.out, product.plan, manifest)


def _as_json(manifest: dict[str, Any]) -> str:
    """Raises VerificationError for figures that JSON does not have."""
    try:
        return json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n"
    except ValueError as error:
        raise VerificationError(
            "a figure of the finished model is NaN or infinite, so it is of no use; raise the budget, or give a plan"
        ) from error


def _require_within(budget: Budget, stage: Path, written: Written) -> None:
    """The last look, at the finished folder itself. Raises BudgetError."""
    whole = sum(f.stat().st_size for f in stage.rglob("*") if f.is_file())
    if budget.kind == "size" and not whole <= budget.value:
        raise BudgetError(
            f"budget {budget}: the finished folder has {whole} bytes, {whole - written.model_bytes} of them beside the "
            "model; raise --budget a little"
        )


def _noted(plan: Plan, note: str) -> Plan:
    """The plan with one more note; "" is none."""
    return replace(plan, notes=(*plan.notes, note)) if note else plan


def _write(
    kind: ArtifactKind,
    source: Checkpoint,
    draft: Any,
    factors: Mapping[str, Factors],
    target: Target,
    stage: Path,
    progress: Progress,
) -> Written:
    written = kind.write(draft, factors, target, stage, lambda d, t: progress("writing", d, t))
    kind.write_companions(source, draft, stage)
    return written
