"""Folders of torch.distributed.checkpoint as tensors where they lie; what describes them is read as data."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties
from torch.distributed.checkpoint.state_dict_saver import save

from rlctl_train.checkpoint.dcp import read_dcp
from rlctl_train.checkpoint.sharded import save_sharded
from rlctl_train.checkpoint.slices import rows
from rlctl_train.checkpoint.stored import DerivedTensor, StoredTensor
from rlctl_train.config.errors import UserError
from tests.mcore_files import Chunked, ChunkPlanner
from tests.stored_tensors import assert_same


def change(folder: Path, edit: Callable[[Any], None]) -> None:
    description = pickle.loads((folder / ".metadata").read_bytes())
    edit(description)
    (folder / ".metadata").write_bytes(pickle.dumps(description))


def save_blocks(folder: Path, whole: torch.Tensor) -> None:
    """Save a matrix [4, 6] as `a`, in four blocks."""
    blocks = [(slice(a, a + 2), slice(b, b + 3)) for a in (0, 2) for b in (0, 3)]
    save({"a": Chunked(whole, blocks)}, storage_writer=FileSystemWriter(folder), planner=ChunkPlanner(), no_dist=True)


def lose_a_block(description: Any) -> None:
    del description.storage_data[next(index for index in description.storage_data if index.offset == (2, 3))]


def test_tensors_of_every_shape_and_dtype_are_found(tmp_path: Path) -> None:
    saved = {
        "matrix": torch.randn(3, 4), "number": torch.tensor(7), "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(2, 2).bfloat16(), "nothing": torch.zeros(0, 4),
        "small": torch.ones(3).to(torch.float8_e4m3fn), "view": torch.arange(12.0).view(3, 4)[1:],
    }  # fmt: skip
    save_sharded(saved, tmp_path)
    found, others = read_dcp(tmp_path)
    assert_same(found, saved)
    assert others == [] and all(isinstance(tensor, StoredTensor) for tensor in found.values())


def test_dimensions_in_another_order_are_put_right(tmp_path: Path) -> None:
    turned = torch.arange(6.0).view(2, 3).t()
    save({"a": turned}, checkpoint_id=tmp_path, no_dist=True)
    found = read_dcp(tmp_path)[0]
    assert isinstance(found["a"], DerivedTensor)
    assert_same(found, {"a": turned})


def test_objects_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    save({"a": torch.ones(1), "b": {"c": "text"}}, checkpoint_id=tmp_path, no_dist=True)
    tensors, others = read_dcp(tmp_path)
    assert (list(tensors), others) == (["a"], ["b.c"])


def test_chunks_in_two_dimensions_are_put_together(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    save_blocks(tmp_path, whole)
    found = read_dcp(tmp_path)[0]["a"]
    assert isinstance(found, StoredTensor) and torch.equal(found.read(), whole)
    assert torch.equal(rows(found, [(3, 1), (1, 2)]).read(), whole[[3, 1, 2]])


def test_a_chunk_that_is_not_listed_is_missing_or_refused(tmp_path: Path) -> None:
    save_blocks(tmp_path, torch.zeros(4, 6))
    change(tmp_path, lose_a_block)
    found = read_dcp(tmp_path, allow_missing=True)[0]["a"]
    assert isinstance(found, StoredTensor) and found.missing() == 6
    with pytest.raises(UserError, match=r"the shards of a do not make up \[4, 6\]"):
        read_dcp(tmp_path)


def test_a_chunk_that_is_listed_twice_counts_once(tmp_path: Path) -> None:
    save_blocks(tmp_path, torch.arange(24.0).view(4, 6))
    change(tmp_path, lambda description: description.state_dict_metadata["a"].chunks.extend(
        description.state_dict_metadata["a"].chunks[:1]
    ))  # fmt: skip
    assert torch.equal(read_dcp(tmp_path)[0]["a"].read(), torch.arange(24.0).view(4, 6))


def test_a_part_of_what_lies_in_another_order_is_refused(tmp_path: Path) -> None:
    save({"a": torch.ones(2, 3).t()}, checkpoint_id=tmp_path, no_dist=True)

    def grow(description: Any) -> None:
        description.state_dict_metadata["a"].size = torch.Size([4, 2])

    change(tmp_path, grow)
    with pytest.raises(UserError, match=r"the shards of a do not make up \[4, 2\]"):
        read_dcp(tmp_path, allow_missing=True)


def test_a_file_is_opened_once_for_all_its_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sharded({f"a.{number}": torch.ones(2) for number in range(9)}, tmp_path)
    opened: Counter[str] = Counter()
    as_it_is = Path.open

    def counting(path: Path, *args: Any, **kwargs: Any) -> Any:
        opened[path.name] += 1
        return as_it_is(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counting)
    read_dcp(tmp_path)
    assert {name: count for name, count in opened.items() if name.endswith(".distcp")} == {"__0_0.distcp": 1}


def test_a_folder_without_a_description_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.metadata: No such file"):
        read_dcp(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x02K\x07.", b"garbage", b"\x80\x02N.", b"\x80\x02."])
def test_a_description_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata(: refused| is damaged)"):
        read_dcp(tmp_path)


def test_a_description_cannot_change_the_classes_that_it_names(tmp_path: Path) -> None:
    patch = b"N}X\x0c\x00\x00\x00storage_dataK\x01s\x86b."
    (tmp_path / ".metadata").write_bytes(b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n" + patch)
    with pytest.raises(UserError, match="refused; a checkpoint may not set the state of"):
        read_dcp(tmp_path)
    assert Metadata.storage_data is None


class AttributeOf:
    """A member of an enum, pickled as Python did before 3.11.4."""

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, (TensorProperties, "__name__")


def test_members_of_enums_of_older_pythons_are_passed_over(tmp_path: Path) -> None:
    save_sharded({"a": torch.ones(2)}, tmp_path)
    change(tmp_path, lambda description: vars(description).update(planner_data=AttributeOf()))
    assert_same(read_dcp(tmp_path)[0], {"a": torch.ones(2)})


def lie_about_an_offset(description: Any) -> None:
    (chunk,) = description.state_dict_metadata["a"].chunks
    vars(chunk)["offsets"] = "x"


def lie_about_a_place(description: Any) -> None:
    (chunk,) = description.state_dict_metadata["a"].chunks
    vars(chunk)["offsets"] = torch.Size([5])


def lie_about_a_length(description: Any) -> None:
    (info,) = description.storage_data.values()
    info.length = -1


def lie_about_a_dtype(description: Any) -> None:
    description.state_dict_metadata["a"].properties.dtype = 5


@pytest.mark.parametrize("lie", [lie_about_an_offset, lie_about_a_place, lie_about_a_length, lie_about_a_dtype])
def test_nothing_in_a_description_is_believed(tmp_path: Path, lie: Callable[[Any], None]) -> None:
    save_sharded({"a": torch.ones(20)}, tmp_path)
    change(tmp_path, lie)
    with pytest.raises(UserError, match=r"\.metadata is damaged"):
        read_dcp(tmp_path)
