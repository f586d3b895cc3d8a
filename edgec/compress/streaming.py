"""Compressing a checkpoint block by block: each block is fitted on what the already compressed blocks really produce.

Fitting all layers on the dense model's activations, as `apply.fit_choices` does, needs the whole model in memory and
lets every layer believe that the layers before it are exact. Here a block's second moments are measured on the hidden
states that come out of the compressed blocks before it; inside a block the layers are fitted in the order in which
they run, each group on the activations that the compressed ones before it leave (GPTQ's "true sequential", Frantar et
al. 2023, arXiv 2210.17323, §4; SVD-LLM's layer-wise update, arXiv 2403.07378, §3.2, is the same thought). And what a
layer is fitted to is not its dense weight but the matrix that makes up for what the layers before it have lost
(`moments.Seen.target`), for which the dense model runs beside the compressed one, block by block as well. On a small
Llama this takes a third off the divergence of int2, and of half ranks in int4.

Peak memory: one block's dense weights twice and its factors, one group's second moments with their factorizations, one
batch's activations, the hidden states up to `limits.MAX_HIDDEN_BYTES`, and one vocabulary matrix while it is fitted.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgec import modeling
from edgec.blocks.stored_weights import StoredWeights
from edgec.blocks.walker import BlockWalker
from edgec.calibration import Batches
from edgec.checkpoint import Checkpoint
from edgec.compress.apply import _shared, _shares, apply_factors
from edgec.compress.heap import return_large_arrays
from edgec.compress.streaming_store import streamed_folder
from edgec.contraction import Gather, evaluate
from edgec.errors import EdgecError
from edgec.fit import Core, Factors, contraction_of, fit
from edgec.modeling import Layer
from edgec.moments import SecondMoment, Seen, TableMoment
from edgec.outputs import work_folder
from edgec.quantize.formats import LayerFormat, QuantizedTensor, storable_scales
from edgec.records import Choice, Plan

logger = logging.getLogger(__name__)

Array = NDArray[Any]

FitChoice = Callable[[Choice, Array, SecondMoment | None], Factors]
"""(choice, the matrix to fit, second moment of its input or None to fit it plainly) → Factors."""

Progress = Callable[[int, int], None]
"""(layers fitted, layers in all)."""

_TARGET_VALUES = 1 << 26
"""Largest head that makes up for drift [values]: that takes three float32 copies of it."""
_ROWS_VALUES = 1 << 25
"""Values of a vocabulary matrix that are fitted at a time [count]."""


def compress_streamed(
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    plan: Plan,
    batches: Batches | None,
    out: Path,
    *,
    plan_text: str,
    force: bool = False,
    sequential: bool = True,
    progress: Progress | None = None,
) -> None:
    """Fit the plan and write the Compressed folder as it is fitted, whole or not at all.

    The same folder as `store.save_compressed` writes, in shards. layers: what `modeling.layers` found. batches: what
    to calibrate on; None fits every layer plainly (no model is run). plan_text: the plan as YAML. sequential: measure
    again after every group of layers of a block (about a fifth more time), not once per block.

    Raises NumericsError naming the layer, UnsupportedModelError where a model does not run block by block, OutputError.
    """
    with streamed_folder(checkpoint, plan, plan_text, out, force=force) as writer, work_folder(out) as scratch:
        fitted = stream_fit(
            checkpoint, layers, plan.choices, batches, folder=scratch, sequential=sequential, progress=progress
        )
        for group in fitted:
            writer.add(group)


def stream_fit(
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    choices: Sequence[Choice],
    batches: Batches | None,
    *,
    fit_choice: FitChoice | None = None,
    folder: Path | None = None,
    sequential: bool = True,
    progress: Progress | None = None,
) -> Iterator[Mapping[str, Factors]]:
    """Factors of every chosen layer, a few layers at a time, each to be written and dropped.

    Layers that share cores (a tied head and its table) come together. folder: where hidden states beyond the cap go;
    a temporary one by default.
    """
    return_large_arrays()
    run = _Run(checkpoint, layers, choices, fit_choice or fit_by_rows, progress)
    if batches is None or not any(map(_calibrated, choices)):
        yield from run.plainly([c.layer for c in choices])
        return
    with tempfile.TemporaryDirectory(prefix="edgec-hidden-", dir=folder) as scratch:
        walker = BlockWalker(checkpoint, [c.layer for c in choices], batches, Path(scratch))
        yield from run.along(walker, sequential)


def fit_by_rows(choice: Choice, weight: Array, moment: SecondMoment | None) -> Factors:
    """`edgec.fit.fit` for weights [out, in] in any float type, with no float32 copy of a large one where that can be.

    A large quantised matrix that stays whole is fitted some rows at a time: they are independent. `svd` reads a large
    one in slabs by itself.
    """
    fmt = LayerFormat.parse(choice.format)
    rows = max(1, _ROWS_VALUES // weight.shape[1])
    starts = range(0, len(weight), rows)
    if choice.spec.kind == "svd" and len(starts) > 1:
        return fit(weight, choice.spec, fmt, role=choice.role, moment=moment)
    if choice.spec.kind != "dense" or not fmt.quantised or len(starts) == 1:
        return fit(np.asarray(weight, np.float32), choice.spec, fmt, role=choice.role, moment=moment)
    parts: list[QuantizedTensor] = []
    for start in starts:
        part = np.asarray(weight[start : start + rows], np.float32)
        core = fit(part, choice.spec, fmt, role=choice.role, moment=moment).cores["weight"]
        assert isinstance(core, QuantizedTensor)
        parts.append(core)
    points = [p.zero_points for p in parts if p.zero_points is not None]
    whole = replace(
        parts[0],
        shape=(int(weight.shape[0]), int(weight.shape[1])),
        codes=np.concatenate([p.codes for p in parts]),
        scales=storable_scales(np.concatenate([p.scales.astype(np.float32) for p in parts])),
        zero_points=np.concatenate(points) if points else None,
    )
    return Factors(contraction_of(choice.spec, whole.shape, choice.role), {"weight": whole})


def table_rows(factors: Factors, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Rows [u, d] of a fitted table; of one that is a single quantised core, no other row is dequantised."""
    if len(factors.contraction.steps) == 1 and isinstance(factors.contraction.steps[0], Gather):
        return _rows(factors.cores[factors.contraction.steps[0].core], ids)
    return np.asarray(evaluate(factors.contraction, factors.values(), ids), np.float32)


def _rows(core: Core, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    if not isinstance(core, QuantizedTensor):
        return np.asarray(core[ids], np.float32)
    points = None if core.zero_points is None else core.zero_points[ids]
    return replace(
        core, shape=(len(ids), core.shape[1]), codes=core.codes[ids], scales=core.scales[ids], zero_points=points
    ).dequantize()


def _calibrated(choice: Choice) -> bool:
    """Does its fit look at what the model does? Dense tables and unquantised dense layers do not."""
    return choice.spec.kind != "dense" or (choice.role != "embedding" and LayerFormat.parse(choice.format).quantised)


class _Run:
    """One compression under way: what was chosen, how to fit it, and how far it is."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: Sequence[Layer],
        choices: Sequence[Choice],
        fit_choice: FitChoice,
        progress: Progress | None,
    ) -> None:
        self.checkpoint, self.fit_choice, self.progress = checkpoint, fit_choice, progress
        self.choices = {choice.layer: choice for choice in choices}
        tied = {layer.name: layer.tied_to for layer in layers if layer.tied_to}
        self.tables = {
            head: table
            for head, table in tied.items()
            if head in self.choices and table in self.choices
            if _shares(self.choices[head], self.choices[table])
        }
        """Head → the table that takes its cores."""
        self.done = 0

    def fit(self, name: str, weight: Array, moment: SecondMoment | None) -> Factors:
        """Raises what the fit raises, naming the layer."""
        try:
            return self.fit_choice(self.choices[name], weight, moment)
        except EdgecError as error:
            raise type(error)(f"layer {name!r}: {error}") from error

    def counted(self, factors: dict[str, Factors]) -> dict[str, Factors]:
        self.done += len(factors)
        if self.progress:
            self.progress(self.done, len(self.choices))
        return factors

    def plainly(self, names: Sequence[str]) -> Iterator[dict[str, Factors]]:
        """Without activations, one layer after the other."""
        weights = StoredWeights(self.checkpoint, modeling.without_memory(self.checkpoint))
        shared = {*self.tables, *self.tables.values()}
        for name in names:
            if name not in shared:
                yield self.counted({name: self.fit(name, weights(name), None)})
        for head in self.tables:
            yield self.counted(self._with_table(head, self.fit(head, weights(head), None)))

    def along(self, walker: BlockWalker, sequential: bool) -> Iterator[dict[str, Factors]]:
        """Table, then block after block, then the head."""
        inside = f"{walker.path}."
        walker.embed_dense()
        outside = [name for name in self.choices if not name.startswith(inside)]
        yield from self._tables(walker, [n for n in outside if self.choices[n].role == "embedding"])
        linears = [n for n in outside if self.choices[n].role != "embedding"]
        early = walker.see_outside([n for n in linears if n != walker.head], after=False)
        for name in early:
            fitted = self.fit(name, walker.weight(name), early[name].moment)
            walker.set_weight(name, fitted.dense())
            yield self.counted({name: fitted})
        late = [n for n in linears if n not in early]
        walker.embed()
        for index in range(len(walker)):
            yield from self._block(walker, index, sequential, last=index == len(walker) - 1 and not late)
        seen = walker.see_outside([n for n in late if _calibrated(self.choices[n])], after=True) if late else {}
        for name in late:
            weight, behind = walker.weight(name), seen.pop(name, None)
            # A table that takes its head's cores must not get what the head makes up for.
            if behind is not None and name not in self.tables and weight.size <= _TARGET_VALUES:
                weight = behind.target(weight)
            fitted = self.fit(name, weight, behind.moment if behind else None)
            yield self.counted(self._with_table(name, fitted) if name in self.tables else {name: fitted})

    def _tables(self, walker: BlockWalker, names: Sequence[str]) -> Iterator[dict[str, Factors]]:
        """Tables are looked up in their compressed form. One that will take its head's cores stands in rounded to
        nearest: the head's activations, which its cores are fitted to, are known at the end only.
        """
        waiting = set(self.tables.values())
        for name in names:
            weight, moment = walker.weight(name), None
            if name == walker.embedding and _calibrated(self.choices[name]):
                moment = TableMoment.of_reads(walker.batches.reads(len(weight)), weight.shape[1])
            fitted = self.fit(name, weight, moment)
            if name == walker.embedding:
                walker.set_table(partial(table_rows, fitted))
            else:
                walker.set_weight(name, fitted.dense())
            if name not in waiting:
                yield self.counted({name: fitted})

    def _block(self, walker: BlockWalker, index: int, sequential: bool, *, last: bool) -> Iterator[dict[str, Factors]]:
        """One block's layers in the order in which they run, and the hidden states behind the compressed block."""
        prefix = f"{walker.name(index)}."
        names = [name for name in self.choices if name.startswith(prefix)]
        with walker.load(index) as block, walker.load(index) as dense:
            planned = [n for n in names if _calibrated(self.choices[n])]
            groups = walker.groups(index, block, planned)
            reached = {name for group in groups for name in group}
            rest = [name for name in names if name not in reached]
            if unseen := [name for name in rest if _calibrated(self.choices[name])]:
                logger.warning("no token reached %d layers, first %r; fitted plainly", len(unseen), unseen[0])
            alone = [group[0] for group in groups if len(group) == 1]
            addends = walker.addends(index, block, alone)
            passes = [[group] for group in groups] if sequential else [groups]

            def put(group: Sequence[str], seen: Seen | None) -> dict[str, Factors]:
                weights = {name: walker.weight(name) for name in group}
                moment = None
                if seen is not None:
                    weights = {name: seen.target(weight) for name, weight in weights.items()}
                    moment = seen.moment
                    del seen  # a large layer's drift is as large as a factorization that its fit makes
                fitted = {name: self.fit(name, weights.pop(name), moment) for name in group}
                apply_factors(block, {name.removeprefix(prefix): f for name, f in fitted.items()})
                return self.counted(fitted)

            yield put(rest, None)
            for together in passes:
                seen = walker.see(index, block, [group[0] for group in together], dense, addends)
                for group in together:
                    yield put(group, seen.pop(group[0]))
            if not last:
                walker.advance(index, block, dense)

    def _with_table(self, head: str, fitted: Factors) -> dict[str, Factors]:
        table = self.choices[self.tables[head]]
        empty = Factors(contraction_of(table.spec, table.shape, table.role), {})
        ours, theirs = _shared(fitted, empty)
        return {head: ours, table.layer: theirs}
