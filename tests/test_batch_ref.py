"""Choosing groups out of several batches moves no tensor and loses no row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rlctl_train.batch import Batch, gather
from rlctl_train.batch_ref import BatchRef, Part, choose


def made(first: int, rows: list[list[int]], width: int) -> BatchRef:
    """Return a batch in as many parts as `rows`, and a score part over all rows; references are the batches."""
    parts: list[Part] = []
    for held in rows:
        ids = torch.tensor([[first + row] * width for row in held])
        ref: Any = Batch({"response_ids": ids, "group": torch.tensor([(first + row) // 2 for row in held])})
        parts.append(Part(tuple(held), ref))
    everything = [row for held in rows for row in held]
    scored: Any = Batch(
        {"score": torch.tensor([float(first + row) for row in sorted(everything)])},
        tuple({"name": first + row} for row in sorted(everything)),
    )
    lengths = np.array([[1, first + row] for row in sorted(everything)])
    batch = BatchRef(tuple(parts), lengths, tuple({"row": first + row} for row in sorted(everything)), group_size=2)
    return batch.plus(Part(tuple(sorted(everything)), scored))


def opened(batch: BatchRef) -> Batch:
    return gather([(part.rows, part.ref) for part in batch.parts], list(range(len(batch))))  # type: ignore[misc]


def test_chosen_groups_keep_their_columns_lengths_and_records_in_the_order_given() -> None:
    first, second = made(0, [[0, 1], [2, 3, 4, 5]], width=2), made(100, [[0, 1, 2, 3]], width=3)
    batch = choose([(first, [2, 1]), (second, [1])])
    rows = [4, 5, 2, 3, 102, 103]
    assert batch.lengths[:, 1].tolist() == rows and [record["row"] for record in batch.records] == rows
    whole = opened(batch)
    assert whole["score"].tolist() == rows and whole["response_ids"][:, 0].tolist() == rows
    assert [record["name"] for record in whole.records] == rows
    assert whole["group"].tolist() == [2, 2, 1, 1, 51, 51]


def test_parts_of_which_nothing_is_chosen_are_left_behind() -> None:
    batch = choose([(made(0, [[0, 1], [2, 3]], width=2), [1]), (made(100, [[0, 1]], width=2), [])])
    assert [part.rows for part in batch.parts] == [(0, 1), (-1, -1, 0, 1)]


def test_wide_columns_go_to_those_who_ask_and_stay_wide_where_groups_are_chosen() -> None:
    full: Any = Batch({"ref_full_logp": torch.zeros(4, 2, 7)})
    batch = choose([(made(0, [[0, 1], [2, 3]], width=2).plus(Part((0, 1, 2, 3), full, wide=True)), [1])])
    rows, *refs = batch.arguments()
    assert len(rows) == len(refs) and full not in refs
    assert batch.arguments(wide=True)[-1] is full and batch.arguments(wide=True)[0][-1] == (-1, -1, 0, 1)


def test_a_chosen_batch_can_be_chosen_from_again() -> None:
    batch = choose([(choose([(made(0, [[0, 1], [2, 3], [4, 5]], width=2), [0, 2])]), [1])])
    assert opened(batch)["score"].tolist() == [4.0, 5.0]


def test_rows_to_learn_from_are_whole_groups_or_what_was_drawn() -> None:
    batch = made(0, [[0, 1], [2, 3]], width=2)
    assert batch.learnt_groups() == [[0, 1], [2, 3]]
    drawn = batch.resampled([3, 0, 3, 3])
    assert drawn.learnt_groups() == [[0], [3], [3], [3]] and len(drawn) == 4
