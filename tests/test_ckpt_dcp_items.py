"""Tensors of torch's distributed checkpoints where they lie, and rows of them, without loading the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from rlctl_train.checkpoint.dcp_items import stored_tensors
from rlctl_train.checkpoint.sharded import save_sharded
from rlctl_train.checkpoint.slices import item, rows
from rlctl_train.checkpoint.stored import Piece, StoredTensor
from rlctl_train.config.errors import UserError
from tests.mcore_files import Chunked, ChunkPlanner


def test_tensors_of_every_shape_and_dtype_are_found(tmp_path: Path) -> None:
    saved = {
        "matrix": torch.randn(3, 4), "number": torch.tensor(7), "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(2, 2).bfloat16(), "nothing": torch.zeros(0, 4),
        "small": torch.ones(3).to(torch.float8_e4m3fn), "view": torch.arange(12.0).view(3, 4)[1:],
    }  # fmt: skip
    save_sharded(saved, tmp_path)
    found = stored_tensors(tmp_path)
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert found[name].dtype == tensor.dtype and found[name].missing() == 0
        read = found[name].read()
        assert read.shape == tensor.shape and torch.equal(read.float(), tensor.float()), name


def test_objects_that_are_no_tensors_are_left_out(tmp_path: Path) -> None:
    save({"a": torch.ones(1), "b": {"c": "text"}}, checkpoint_id=tmp_path, no_dist=True)
    assert list(stored_tensors(tmp_path)) == ["a"]


def test_chunks_in_two_dimensions_are_put_together(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    blocks = [(slice(a, a + 2), slice(b, b + 3)) for a in (0, 2) for b in (0, 3)]
    save({"a": Chunked(whole, blocks)}, storage_writer=FileSystemWriter(tmp_path), planner=ChunkPlanner(), no_dist=True)
    assert torch.equal(stored_tensors(tmp_path)["a"].read(), whole)
    assert torch.equal(rows(stored_tensors(tmp_path)["a"], [(3, 1), (1, 2)]).read(), whole[[3, 1, 2]])


def test_a_folder_without_a_description_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.metadata: No such file"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x02K\x07.", b"garbage", b"\x80\x02N."])
def test_a_description_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="does not describe tensors"):
        stored_tensors(tmp_path)


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
