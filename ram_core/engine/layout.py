"""A step laid out: which models read what, and every number of it in one array, for one upload.

The layout is all of a step but its numbers. What a step does on the device is a function of the two, so a
step that was recorded once can be run again for any other numbers of an equal layout: no integer can slip
into the record that is not in its key.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from ram_core.engine.pages import pages_for
from ram_core.engine.rows import ScheduledRow
from ram_core.models.packing import BatchLayout, PackedBatch, Row, lay_out
from ram_core.resampling import StepFeatures

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ModelUse:
    """One model's part of a step.

    With `is_fed`, its tokens come from the table of tokens drawn last, or from the numbers, as each says;
    without, all of them from the numbers. With `has_terms`, its logits weigh on rows that draw. With
    `is_stacked`, `model` is a group of models that share a module, and each token has the slot of its own.
    """

    model: str
    pool: str
    batch: BatchLayout
    is_fed: bool
    has_terms: bool
    is_stacked: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """How many numbers there are of the batch, sources, slots, owners, and terms' rows and strengths."""
        num_tokens, num_terms = self.batch.num_tokens, self.batch.num_logits if self.has_terms else 0
        num_sources, num_slots = num_tokens * self.is_fed, num_tokens * self.is_stacked
        num_owners = num_tokens * self.batch.has_silent_tokens
        return self.batch.num_numbers, num_sources, num_slots, num_owners, num_terms, num_terms


@dataclass(frozen=True, slots=True)
class UseNumbers:
    """The numbers of a model's part.

    `sources` index the table of tokens drawn last, and behind it the batch's own. `group_slots` say which of
    a group's models reads each token. `owners`, if some tokens are silent, say who is to blame if one breaks:
    the slot of its sequence, or the padding's if the token draws and so tells by its logits. `rows` are those
    of the step that the logits belong to, with what `strength`; padding belongs to the row after the last.
    """

    batch: PackedBatch
    sources: Int64[Tensor, " token"]
    group_slots: Int64[Tensor, " token"]
    owners: Int64[Tensor, " token"]
    rows: Int64[Tensor, " logit"]
    strength: Float[Tensor, " logit"]


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """The numbers of a step: each model's, and the slots and positions of the rows that draw."""

    uses: tuple[UseNumbers, ...]
    slots: Int64[Tensor, " row"]
    positions: Int64[Tensor, " row"]


@dataclass(frozen=True, slots=True)
class StepLayout:
    """All of a step but its numbers: the models that take part, how many rows draw, and what these need."""

    uses: tuple[ModelUse, ...]
    num_drawing: int
    features: StepFeatures

    def read(self, flat: Int64[Tensor, " number"]) -> StepNumbers:
        """The step whose numbers are `flat`; only the strengths are copied, from float64."""
        sizes = [size for use in self.uses for size in use.sizes]
        *parts, slots, positions = torch.split(flat, [*sizes, self.num_drawing, self.num_drawing])
        uses = []
        for index, use in enumerate(self.uses):
            batch, sources, group_slots, owners, rows, strength = parts[6 * index : 6 * index + 6]
            packed, weights = use.batch.read(batch), strength.view(torch.float64).float()
            uses.append(UseNumbers(packed, sources, group_slots, owners, rows, weights))
        return StepNumbers(tuple(uses), slots, positions)


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A step ready to be computed; the first `num_real` of its rows that draw are no padding."""

    layout: StepLayout
    numbers: Numbers
    num_real: int


@dataclass(frozen=True, slots=True)
class Shapes:
    """To what steps that only draw are padded: numbers of rows and of pages in a row, ascending.

    A step takes the first of `features` that holds what its rows need, or that alone if there is none.
    """

    rows: tuple[int, ...]
    pages: tuple[int, ...]
    features: tuple[StepFeatures, ...] = ()

    def num_rows(self, wanted: int) -> int:
        """So many rows that `wanted` fit."""
        return next(size for size in self.rows if size >= wanted)

    def num_pages(self, wanted: int) -> int:
        """So many pages in a row that `wanted` fit."""
        return next(size for size in self.pages if size >= wanted)

    def features_for(self, wanted: StepFeatures) -> StepFeatures:
        """What is to be done of the step."""
        return next((offered for offered in self.features if _covers(offered, wanted)), wanted)


def _covers(offered: StepFeatures, wanted: StepFeatures) -> bool:
    """Whether `offered` does all that is wanted; what aligners need is never offered without them."""
    names = [field.name for field in fields(StepFeatures)]
    is_enough = all(getattr(offered, name) >= getattr(wanted, name) for name in names)
    return is_enough and offered.is_aligned == wanted.is_aligned


def bucket(size: int) -> int:
    """The next power of two; above 8 the next of at most 8 equal parts of one: few sizes, little padding."""
    if size <= 8:
        return 1 << (size - 1).bit_length()
    part = max(8, 1 << (size - 1).bit_length() - 3)
    return -(-size // part) * part


def buckets(largest: int) -> tuple[int, ...]:
    """All that `bucket` makes of sizes up to `largest`."""
    return tuple(sorted({bucket(size) for size in range(1, largest + 1)}))


class Served(NamedTuple):
    """What reads a part of a step: a model or a group, the pool of its pages, and whether slots are told."""

    model: str
    pool: str
    is_stacked: bool = False


@dataclass(frozen=True, slots=True)
class StepPacker:
    """Lays steps out. The `padding_slot` is the last of the table of tokens drawn last."""

    page_size: int
    padding_slot: int
    shapes: Shapes | None = None

    def pack(self, rows: Rows[ScheduledRow]) -> PackedStep:
        """The step of some scheduled rows, padded if they only draw and there are shapes to pad to."""
        drawing = [row for row in rows if row.draws]
        asked = [(row.sequence.request.sampling, row.sequence.request.alignment) for row in drawing]
        features = StepFeatures.of(asked)
        shapes = self.shapes
        if shapes is not None and not all(row.is_plain for row in rows):
            shapes = None
        num_drawing, num_pages = len(drawing), 0
        if shapes is not None:
            num_drawing, features = shapes.num_rows(num_drawing), shapes.features_for(features)
            num_pages = shapes.num_pages(pages_for(max(row.end for row in rows), self.page_size))
        place = {id(row): index for index, row in enumerate(drawing)}
        uses = []
        lanes = lanes_by_use(rows)
        for busy in lanes.values():
            num_rows = 0
            if shapes is not None:
                # One aligner's part has as many rows as the proposal's, whoever uses it: a layout the fewer.
                num_rows = num_drawing if len(lanes) <= 2 else shapes.num_rows(len(busy))
            maker = _UseMaker(self, num_rows, num_pages, is_fed=shapes is not None)
            uses.append(maker.make(busy, place, num_drawing))
        slots = [(row.sequence.slot, row.end) for row in drawing]
        return self._join(uses, slots, num_drawing, features)

    def blank(
        self, models: Rows[Served], num_rows: int, num_pages: int, features: StepFeatures
    ) -> PackedStep:
        """A step of padding alone: of `models`, the proposal first."""
        maker = _UseMaker(self, num_rows, num_pages, is_fed=True)
        uses = [
            maker.finish(served, [], {}, [], [], None if index == 0 else [], num_rows)
            for index, served in enumerate(models)
        ]
        return self._join(uses, [], num_rows, features)

    def _join(
        self,
        uses: Rows[tuple[ModelUse, Numbers]],
        drawing: list[tuple[int, int]],
        num_drawing: int,
        features: StepFeatures,
    ) -> PackedStep:
        padded = drawing + [(self.padding_slot, 0)] * (num_drawing - len(drawing))
        layout = StepLayout(tuple(use for use, _ in uses), num_drawing, features)
        ends = np.array(padded, dtype=np.int64).reshape(-1, 2).T.reshape(-1)
        return PackedStep(layout, np.concatenate([*[numbers for _, numbers in uses], ends]), len(drawing))


def lanes_by_use(rows: Rows[ScheduledRow]) -> dict[tuple[str, int], list[tuple[ScheduledRow, int]]]:
    """The lanes that have anything to read by what serves them; the proposal's come first, as in a row.

    A row that has several lanes in a group takes part in as many forwards of it, as a term knows a row once.
    Lanes of a group are in the order of their slots, those of one token before the others.
    """
    found: dict[tuple[str, int], list[tuple[ScheduledRow, int]]] = {}
    for row in rows:
        turns: dict[str, int] = {}
        for lane, kept in enumerate(row.lanes):
            if row.lane_starts[lane] < row.end:
                name = kept.group or kept.model
                found.setdefault((name, turns.setdefault(name, 0)), []).append((row, lane))
                turns[name] += 1
    for busy in found.values():
        busy.sort(key=_place_in_group)
    return found


def _place_in_group(use: tuple[ScheduledRow, int]) -> tuple[bool, int]:
    row, lane = use
    kept = row.lanes[lane]
    # Elsewhere the order stays as it is.
    is_long = kept.group_slot >= 0 and row.end - row.lane_starts[lane] > 1
    return is_long, kept.group_slot


@dataclass(frozen=True, slots=True)
class _UseMaker:
    """Makes models' parts of one step."""

    packer: StepPacker
    num_rows: int
    num_pages: int
    is_fed: bool

    def make(
        self, busy: Rows[tuple[ScheduledRow, int]], place: dict[int, int], num_drawing: int
    ) -> tuple[ModelUse, Numbers]:
        """The part of one model: `busy` are the lanes of it that have anything to read."""
        packed: list[Row] = []
        fed: dict[int, int] = {}
        terms: list[tuple[int, float]] = []
        group_slots: list[int] = []
        owners: list[int] = []
        num_tokens = 0
        for row, lane in busy:
            start, known, kept = row.lane_starts[lane], row.sequence.token_ids, row.lanes[lane]
            token_ids = known[start : row.end]
            num_tokens += row.end - start
            if len(known) < row.end:
                # Drawn by the step under way: the device knows it, the host does not yet.
                token_ids.append(0)
                fed[num_tokens - 1] = row.sequence.slot
            packed.append(Row(token_ids, start, kept.pages, row.draws))
            group_slots += [kept.group_slot] * len(token_ids)
            owners += [row.sequence.slot] * (len(token_ids) - row.draws)
            owners += [self.packer.padding_slot] * row.draws
            if row.draws and lane:
                terms.append((place[id(row)], kept.strength))
        row, lane = busy[0]
        kept = row.lanes[lane]
        served = Served(kept.group or kept.model, kept.pool, kept.group_slot >= 0)
        return self.finish(served, packed, fed, group_slots, owners, terms if lane else None, num_drawing)

    def finish(
        self,
        served: Served,
        rows: list[Row],
        fed: dict[int, int],
        group_slots: list[int],
        owners: list[int],
        terms: list[tuple[int, float]] | None,
        num_drawing: int,
    ) -> tuple[ModelUse, Numbers]:
        """`fed`: which tokens come from which slot. An aligner has `terms`: rows that draw, and strengths."""
        batch, numbers = lay_out(
            rows, page_size=self.packer.page_size, num_rows=self.num_rows, num_pages=self.num_pages
        )
        parts = [numbers]
        is_fed = self.is_fed or bool(fed)
        if is_fed:
            sources = np.arange(batch.num_tokens) + self.packer.padding_slot + 1
            sources[list(fed)] = list(fed.values())
            parts.append(sources)
        if served.is_stacked:
            # Padding is read by a model that is read anyway.
            last = group_slots[-1] if group_slots else 0
            parts.append(np.array(group_slots + [last] * (batch.num_tokens - len(group_slots)), np.int64))
        if batch.has_silent_tokens:
            parts.append(np.array(owners, np.int64))
        if terms is not None:
            # Padding belongs to none of the step's rows.
            padded = terms + [(num_drawing, 0.0)] * (batch.num_logits - len(terms))
            index, strength = zip(*padded, strict=True) if padded else ((), ())
            parts += [np.array(index, np.int64), np.array(strength, np.float64).view(np.int64)]
        has_terms = bool(terms is not None and batch.num_logits)
        use = ModelUse(served.model, served.pool, batch, is_fed, has_terms, served.is_stacked)
        return use, np.concatenate(parts)
