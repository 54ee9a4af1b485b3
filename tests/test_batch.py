"""Batch: joining, gathering, and travelling."""

import pickle

import pytest
import torch

from rlctl_train.batch import Batch, concat, gather, length_mask, pad_rows


def columns(rows: list[int], width: int = 2) -> Batch:
    ids = torch.tensor([[row * 10 + i for i in range(width)] for row in rows])
    return Batch({"ids": ids, "row": torch.tensor(rows)}, tuple({"row": row} for row in rows))


def test_gather_returns_wanted_rows_in_the_order_asked():
    parts = [((0, 2), columns([0, 2])), ((1, 3), columns([1, 3], width=3))]
    batch = gather(parts, [3, 0, 1])
    assert batch["row"].tolist() == [3, 0, 1]
    assert batch["ids"].tolist() == [[30, 31, 32], [0, 1, 0], [10, 11, 12]]
    assert [record["row"] for record in batch.records] == [3, 0, 1]


def test_gather_repeats_rows_that_are_asked_for_repeatedly():
    whole = gather([([0, 1], Batch({"x": torch.tensor([5, 6])}, ({"n": 0}, {"n": 1})))], [1, 0, 1, 1])
    assert whole["x"].tolist() == [6, 5, 6, 6] and [record["n"] for record in whole.records] == [1, 0, 1, 1]


def test_gather_leaves_out_columns_that_some_row_lacks():
    parts = [((0, 1), columns([0, 1])), ((1,), Batch({"score": torch.tensor([1.0])}))]
    assert "score" not in gather(parts, [0, 1])
    assert gather(parts, [1])["score"].tolist() == [1.0]


def test_gather_gives_response_columns_of_parts_made_apart_one_width():
    asked = Batch({"response_mask": torch.ones(1, 2), "prompt_ids": torch.ones(1, 4)})
    scored = Batch({"rewards": torch.ones(2, 3)})
    batch = gather([((0,), asked), ((0, 1), scored)], [0])
    assert batch["response_mask"].tolist() == [[1, 1, 0]] and batch["rewards"].tolist() == [[1, 1, 1]]
    assert batch["prompt_ids"].shape == (1, 4)


def test_gather_refuses_a_column_given_twice_for_a_row():
    with pytest.raises(AssertionError, match="twice"):
        gather([((0,), columns([0])), ((0,), columns([0]))], [0])


def test_gather_merges_records_of_the_same_row():
    parts = [((0,), columns([0])), ((0,), Batch({"score": torch.ones(1)}, ({"reason": "right"},)))]
    assert gather(parts, [0]).records == ({"row": 0, "reason": "right"},)


def test_no_rows_give_an_empty_batch_with_every_column():
    batch = gather([((0, 1), columns([0, 1]))], [])
    assert len(batch) == 0


def test_concat_pads_to_the_widest_part():
    batch = concat([columns([0], width=1), columns([1], width=3)])
    assert batch["ids"].tolist() == [[0, 0, 0], [10, 11, 12]]


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(AssertionError, match="unequal"):
        Batch({"a": torch.zeros(2), "b": torch.zeros(3)})


def test_a_batch_survives_pickling_unchanged():
    batch = columns([4, 5])
    copy = pickle.loads(pickle.dumps(batch, protocol=5))
    assert torch.equal(copy["ids"], batch["ids"]) and copy.records == batch.records


def test_masks_and_padding_agree_on_lengths():
    ids = pad_rows([[1, 2, 3], [4]], dtype=torch.long)
    assert (ids > 0).float().tolist() == length_mask(torch.tensor([3, 1]), 3).tolist()
