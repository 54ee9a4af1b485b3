"""Buckets, packing and checksums: what leaves the trainer is what the receiver holds, or it is caught."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlctl_train.checksum import Checksum, checksum, tensor_digest
from rlctl_train.sync.buckets import buckets, pack, unpack
from rlctl_train.sync.transfer import SyncError, compare


def weights(*sizes: int) -> list[tuple[str, Tensor]]:
    torch.manual_seed(0)
    return [(f"layer.{i}", torch.randn(size)) for i, size in enumerate(sizes)]


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 200))
def test_buckets_keep_order_and_respect_their_size(sizes: list[int], max_bytes: int) -> None:
    tensors = weights(*sizes)
    cut = list(buckets(iter(tensors), max_bytes))
    assert [name for bucket in cut for name, _ in bucket] == [name for name, _ in tensors]
    assert all(bucket for bucket in cut)
    assert all(len(bucket) == 1 or sum(t.nbytes for _, t in bucket) <= max_bytes for bucket in cut)


@pytest.mark.parametrize(("max_bytes", "num_read"), [(16, 1), (20, 2)])
def test_a_full_bucket_reads_nothing_ahead_and_another_one_tensor(max_bytes: int, num_read: int) -> None:
    read = []

    def stream():  # type: ignore[no-untyped-def]
        for name, tensor in weights(4, 4, 4, 4):
            read.append(name)
            yield name, tensor

    next(buckets(stream(), max_bytes))
    assert len(read) == num_read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_buckets_arrive_to_the_bit(dtype: torch.dtype) -> None:
    bucket = [*weights(7, 1), ("matrix", torch.randn(3, 5).t())]
    arrived = unpack(pack(bucket, dtype))
    for (name, sent), (name_too, got) in zip(bucket, arrived, strict=True):
        assert name == name_too and got.dtype == dtype
        assert torch.equal(sent.to(dtype), got)


def test_packed_arrays_may_be_read_only() -> None:
    packed = pack(weights(5), torch.float32)
    packed[0][1].setflags(write=False)
    assert len(unpack(packed)[0][1]) == 5


def test_the_checksum_ignores_order_and_cutting() -> None:
    tensors = weights(5, 9, 3)
    running = Checksum(torch.float32)
    running.add(tensors[2:])
    running.add(tensors[:2])
    assert running.hexdigest() == checksum(tensors, torch.float32)


def test_the_checksum_is_of_the_values_in_the_rollout_precision() -> None:
    tensors = weights(6)
    rounded = [(name, tensor.bfloat16()) for name, tensor in tensors]
    assert checksum(tensors, torch.bfloat16) == checksum(rounded, torch.bfloat16)
    assert checksum(tensors, torch.float32) != checksum(rounded, torch.float32)


def test_a_layout_in_memory_does_not_matter() -> None:
    matrix = torch.randn(6, 4)
    assert tensor_digest(matrix, torch.float32) == tensor_digest(matrix.t().contiguous().t(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.data())
def test_any_changed_bit_changes_the_digest(dtype: torch.dtype, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 50))
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    spoiled = values.clone()
    bits = spoiled.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 14))
    assert tensor_digest(values, dtype) != tensor_digest(spoiled, dtype)


@pytest.mark.parametrize("size", [3, 5, 64, 1 << 20, (1 << 20) + 7, 1 << 22])
def test_negated_swapped_and_shifted_values_change_the_digest(size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(1))
    swapped = values.clone()
    swapped[[0, -1]] = values[[-1, 0]]
    changed = [-values, swapped, values.roll(1), torch.zeros(size), values.view(1, -1)]
    digests = {tensor_digest(tensor, torch.float32) for tensor in [values, *changed]}
    assert len(digests) == len(changed) + 1


def test_tensors_of_equal_shape_cannot_trade_names() -> None:
    (a, x), (b, y) = weights(4, 4)
    assert checksum([(a, x), (b, y)], torch.float32) != checksum([(a, y), (b, x)], torch.float32)


def test_zeros_of_either_sign_are_equal() -> None:
    assert tensor_digest(torch.zeros(3), torch.float32) == tensor_digest(-torch.zeros(3), torch.float32)


def test_unequal_checksums_name_the_version() -> None:
    compare("a", "a", 3)
    with pytest.raises(SyncError, match="version 3"):
        compare("a", "b", 3)
