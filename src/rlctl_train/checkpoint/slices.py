"""Parts of stored tensors as stored tensors: bytes of files still, so that only what is asked for is ever read.

Along the first dimension every part of a piece is contiguous, whichever block of the whole the piece is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rlctl_train.checkpoint.stored import Piece, StoredTensor

Span = tuple[int, int]
"""First row and number of rows."""


def rows(whole: StoredTensor, spans: Sequence[Span]) -> StoredTensor:
    """Return these spans of rows, one after the other, as a tensor [sum of their lengths, ...]."""
    pieces: list[Piece] = []
    at = 0
    for first, count in spans:
        assert first >= 0 and first + count <= whole.shape[0]
        pieces += _cut(whole.pieces, first, count, at, whole.dtype.itemsize)
        at += count
    return replace(whole, shape=(at, *whole.shape[1:]), pieces=tuple(pieces))


def item(whole: StoredTensor, index: int) -> StoredTensor:
    """Return the tensor at an index of the first dimension, without that dimension."""
    row = rows(whole, [(index, 1)])
    pieces = [replace(piece, start=piece.start[1:], shape=piece.shape[1:]) for piece in row.pieces]
    return replace(row, shape=row.shape[1:], pieces=tuple(pieces))


def _cut(pieces: Sequence[Piece], first: int, count: int, at: int, itemsize: int) -> Iterator[Piece]:
    """Yield what of the pieces lies in a span of rows, for a tensor in which that span begins at row `at`."""
    for piece in pieces:
        begin = max(first, piece.start[0])
        end = min(first + count, piece.start[0] + piece.shape[0])
        if begin < end:
            skipped = (begin - piece.start[0]) * math.prod(piece.shape[1:]) * itemsize
            yield Piece(
                piece.file,
                piece.offset + skipped,
                (at + begin - first, *piece.start[1:]),
                (end - begin, *piece.shape[1:]),
            )
