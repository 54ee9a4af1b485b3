"""A batch as the controller sees it: where its columns lie, how long its rows are; no tensor among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

UNUSED = -1
"""Stands for a row of a part that no row of the batch is."""


@dataclass(frozen=True)
class Part:
    """One object in the store: a Batch that holds some columns of some rows."""

    rows: tuple[int, ...]
    ref: ray.ObjectRef
    wide: bool = False
    """Its columns are [S, T, V], which the policy's update alone reads."""


@dataclass(frozen=True)
class BatchRef:
    """Parts, lengths and plain records."""

    parts: tuple[Part, ...]
    lengths: np.ndarray
    """[S, 2] prompt and response lengths, in tokens."""
    records: tuple[dict[str, Any], ...]
    group_size: int
    """Consecutive rows that answer the same prompt."""
    drawn: tuple[int, ...] | None = None
    """Rows to learn from, some of them several times; None learns from each once."""

    def __len__(self) -> int:
        return len(self.lengths)

    def plus(self, *parts: Part) -> BatchRef:
        """Return the batch with further columns."""
        return replace(self, parts=self.parts + parts)

    def resampled(self, rows: Sequence[int]) -> BatchRef:
        """Return the batch with the rows to learn from; from then on each row stands for itself."""
        return replace(self, drawn=tuple(sorted(rows)), group_size=1)

    def learnt_groups(self) -> list[list[int]]:
        """Return the rows to learn from, those that answer the same prompt together."""
        rows = list(range(len(self)) if self.drawn is None else self.drawn)
        return [rows[i : i + self.group_size] for i in range(0, len(rows), self.group_size)]

    def arguments(self, *, wide: bool = False) -> tuple[Any, ...]:
        """Return the layout and the references, as workers take them; with `wide` also those of wide columns."""
        parts = [part for part in self.parts if wide or not part.wide]
        return [part.rows for part in parts], *(part.ref for part in parts)


def choose(groups: Sequence[tuple[BatchRef, Sequence[int]]]) -> BatchRef:
    """Return the named groups of several batches as one batch; nothing moves, rows are numbered anew."""
    size = groups[0][0].group_size
    parts: list[Part] = []
    lengths: list[np.ndarray] = []
    records: list[dict[str, Any]] = []
    for batch, numbers in groups:
        rows = [number * size + i for number in numbers for i in range(size)]
        place = {row: len(records) + i for i, row in enumerate(rows)}
        for part in batch.parts:
            renumbered = tuple(place.get(row, UNUSED) for row in part.rows)
            if any(row != UNUSED for row in renumbered):
                parts.append(replace(part, rows=renumbered))
        lengths.append(batch.lengths[rows])
        records += [batch.records[row] for row in rows]
    return BatchRef(tuple(parts), np.concatenate(lengths), tuple(records), size)
