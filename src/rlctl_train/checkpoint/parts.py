"""Blocks of stored tensors as tensors of their own: without reading them where their bytes lie together."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from rlctl_train.checkpoint.stored import DerivedTensor, NamedTensor, Piece, StoredTensor


def cut(tensor: NamedTensor, first: int, shape: tuple[int, ...]) -> NamedTensor:
    """Return the elements from the `first` on, in C order, as a tensor of that shape."""
    if first == 0 and shape == tensor.shape:
        return tensor
    pieces = _pieces(tensor, first, shape)
    if pieces is not None:
        return StoredTensor(tensor.name, tensor.dtype, shape, pieces)
    num = math.prod(shape)

    def make() -> Tensor:
        return tensor.read().view(-1)[first : first + num].clone().view(shape)

    return DerivedTensor(tensor.name, tensor.dtype, shape, make)


def is_same(a: NamedTensor, b: NamedTensor) -> bool:
    """Say whether two tensors are the very same bytes in the same files, without reading them."""
    if not isinstance(a, StoredTensor) or not isinstance(b, StoredTensor):
        return a is b
    return (a.dtype, a.shape, a.pieces) == (b.dtype, b.shape, b.pieces)


def _pieces(tensor: NamedTensor, first: int, shape: tuple[int, ...]) -> tuple[Piece, ...] | None:
    """Return the block in pieces that are whole rows of `shape`, or None where it does not fall into such."""
    rows = tensor.in_rows() if isinstance(tensor, StoredTensor) and shape else None
    if rows is None:
        return None
    found: list[Piece] = []
    width = math.prod(shape[1:])
    for begin, piece in zip(_begins(rows), rows, strict=True):
        low, high = max(first, begin), min(first + math.prod(shape), begin + piece.size)
        if low >= high:
            continue
        if (low - first) % width or (high - low) % width:
            return None
        start = ((low - first) // width, *[0] * (len(shape) - 1))
        offset = piece.offset + (low - begin) * tensor.dtype.itemsize
        found.append(Piece(piece.file, offset, start, ((high - low) // width, *shape[1:])))
    return tuple(found)


def _begins(rows: Sequence[Piece]) -> list[int]:
    begins = [0]
    for piece in rows:
        begins.append(begins[-1] + piece.size)
    return begins[:-1]
