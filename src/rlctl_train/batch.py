"""Batch: the one record that travels. Named columns, one row per sequence; it only moves forward.

Letters: S sequences, P padded prompt length, T padded response length.

    prompt_ids [S, P]      prompt tokens, padded on the right
    prompt_len [S]         real prompt length
    response_ids [S, T]    sampled tokens, padded on the right
    response_len [S]       real response length (the end-of-sequence token counts)
    response_mask [S, T]   1 on tokens the model sampled, 0 on padding and on tokens it did not write
    rollout_logp [S, T]    log-probability of each sampled token, from the rollout engine
    old_logp, ref_logp, values, rewards, advantages, returns [S, T]
    rollout_weights [S, T] importance weights of the policy loss, 0 on padding
    kept_mask [S, T]       the part of `response_mask` that rollout correction leaves to learn from
    score [S]              the reward of the response as a whole
    correct [S]            1 where the response is right, or scores above 0 where the reward tells no right and wrong
    part/<name> [S]        one part of a reward of several parts, for the algorithm that reads it
    baseline [S]           the score of the greedy response to the same prompt
    sum_pi_squared [S, T]  the sum over the vocabulary of squared probabilities where a token was drawn
    reward_logp [S, T]     the reward model's log-probability of each sampled token
    ref_full_logp [S, T, V]  the reference's log-probability of every token of the vocabulary at each place
    teacher_logp [S, T]    the teacher's log-probability of each sampled token
    teacher_ids, teacher_top_logp [S, T, K]
                           the teacher's K likeliest tokens at each place and their log-probabilities
    group [S]              which prompt of the step the sequence answers
    row [S]                number of the sequence among those that the step samples
    policy_version [S]     which weights sampled it
    truncated [S]          1 where the response ended at the length limit
    seconds [S]            from the begin of generation to the last token, where the rollout engine tells
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Columns (tensors whose first dim is S) and one plain record per sequence."""

    columns: Mapping[str, Tensor]
    records: tuple[Mapping[str, Any], ...] = field(default=())

    def __post_init__(self) -> None:
        sizes = {name: len(column) for name, column in self.columns.items()}
        assert len(set(sizes.values())) <= 1, f"columns of unequal length: {sizes}"
        assert not self.records or not sizes or len(self.records) == len(self), "one record per sequence"

    def __reduce__(self) -> tuple[Any, ...]:
        # NumPy arrays travel out of band in pickle 5, which Ray's object store uses; tensors would be copied twice.
        return _from_numpy, ({name: column.numpy() for name, column in self.columns.items()}, self.records)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else len(self.records)

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def with_columns(self, **columns: Tensor) -> Batch:
        """Return the same rows with columns added or replaced."""
        return Batch({**self.columns, **columns}, self.records)

    def rows(self, indices: Sequence[int] | Tensor) -> Batch:
        """Return the chosen rows, in the order given."""
        index = torch.as_tensor(indices, dtype=torch.long)
        records = tuple(self.records[i] for i in index.tolist()) if self.records else ()
        return Batch({name: column[index] for name, column in self.columns.items()}, records)

    def lengths(self) -> Tensor:
        """Return real sequence lengths (prompt and response), [S] in tokens."""
        return self["prompt_len"] + self["response_len"]


def concat(batches: Sequence[Batch]) -> Batch:
    """Join batches row-wise; [S, X, ...] columns are padded on the right with zeros to the widest X."""
    first = batches[0]
    columns = {name: _join([batch[name] for batch in batches]) for name in first.columns}
    return Batch(columns, tuple(record for batch in batches for record in batch.records))


def pad_rows(
    rows: Sequence[Sequence[float]] | Sequence[Tensor], *, dtype: torch.dtype, width: int | None = None
) -> Tensor:
    """Stack ragged rows into [S, X], zeros on the right; X is `width` or the longest row (at least 1)."""
    longest = max([len(row) for row in rows], default=0)
    out = torch.zeros(len(rows), max(width or longest, 1), dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=dtype)
    return out


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """Return [S, width] of ones before each length and zeros after it, as float32."""
    return (torch.arange(width, device=lengths.device) < lengths[:, None]).float()


def _from_numpy(columns: dict[str, Any], records: tuple[Mapping[str, Any], ...]) -> Batch:
    return Batch({name: torch.tensor(column) for name, column in columns.items()}, records)


def _join(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].ndim == 1:
        return torch.cat(list(parts))
    width = max(part.shape[1] for part in parts)
    return torch.cat([_widen(part, width) for part in parts])


def gather(parts: Sequence[tuple[Sequence[int], Batch]], rows: Sequence[int]) -> Batch:
    """Assemble `rows` (global row numbers, also repeated) from parts that each hold some rows and some columns.

    A column that occurs in several parts must occur for different rows; a column is returned only if every wanted
    row has it. Records of the same row in several parts are merged, later parts over earlier ones. Columns
    [S, T, ...] of parts made apart get the same T, zeros on the right.
    """
    place = {row: i for i, row in enumerate(dict.fromkeys(rows))}
    if len(place) < len(rows):
        return gather(parts, list(place)).rows([place[row] for row in rows])
    pieces: dict[str, list[tuple[list[int], Tensor]]] = {}
    records: list[dict[str, Any]] = [{} for _ in rows]
    for part_rows, batch in parts:
        held = [i for i, row in enumerate(part_rows) if row in place]
        if not held:
            continue
        chosen = batch.rows(held)
        target = [place[part_rows[i]] for i in held]
        for name, column in chosen.columns.items():
            pieces.setdefault(name, []).append((target, column))
        for i, record in zip(target, chosen.records, strict=False):
            records[i].update(record)
    scattered = {name: _scatter(found, len(rows)) for name, found in pieces.items()}
    columns = {name: column for name, column in scattered.items() if column is not None}
    width = max([column.shape[1] for name, column in columns.items() if _is_response(name, column)], default=0)
    return Batch({n: _widen(c, width) if _is_response(n, c) else c for n, c in columns.items()}, tuple(records))


def _is_response(name: str, column: Tensor) -> bool:
    return column.ndim > 1 and name != "prompt_ids"


def _widen(column: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(column, (0, 0) * (column.ndim - 2) + (0, width - column.shape[1]))


def _scatter(pieces: list[tuple[list[int], Tensor]], num_rows: int) -> Tensor | None:
    targets = [i for target, _ in pieces for i in target]
    if len(targets) < num_rows:
        return None
    assert len(targets) == num_rows == len(set(targets)), "a column is given twice for the same row"
    joined = _join([column for _, column in pieces])
    out = torch.empty_like(joined)
    out[torch.tensor(targets)] = joined
    return out
