"""Rows and items of stored tensors are those of the tensors, in whatever pieces these lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlctl_train.checkpoint.slices import item, rows
from rlctl_train.checkpoint.stored import Piece, StoredTensor


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, StoredTensor]:
    """A tensor [6, 4], and the same in a file, in three pieces: its first rows, and the left and right of the rest."""
    whole, path = torch.arange(24.0).view(6, 4), tmp_path_factory.mktemp("cut") / "file"
    blocks = {(0, 0): whole[:2], (2, 0): whole[2:, :1], (2, 1): whole[2:, 1:]}
    path.write_bytes(b"".join(block.contiguous().numpy().tobytes() for block in blocks.values()))
    offsets = (0, 32, 48)
    pieces = [Piece(path, at, start, tuple(b.shape)) for at, (start, b) in zip(offsets, blocks.items(), strict=True)]
    return whole, StoredTensor("a", torch.float32, (6, 4), tuple(pieces))


@given(st.lists(st.integers(0, 5).flatmap(lambda first: st.tuples(st.just(first), st.integers(0, 6 - first)))))
def test_any_rows_in_any_order_are_the_tensors_rows(
    cut: tuple[torch.Tensor, StoredTensor], spans: list[tuple[int, int]]
) -> None:
    whole, stored = cut
    expected = torch.cat([whole[:0], *(whole[first : first + count] for first, count in spans)])
    assert torch.equal(rows(stored, spans).read(), expected)


def test_an_item_loses_its_dimension(cut: tuple[torch.Tensor, StoredTensor]) -> None:
    whole, stored = cut
    assert [torch.equal(item(stored, index).read(), whole[index]) for index in range(6)] == [True] * 6
    assert torch.equal(item(item(stored, 4), 3).read(), whole[4, 3])
