"""Tensors as they lie in files: where the bytes of each are, to be read in pieces; nothing is loaded to know them.

A reader (`checkpoint.kinds`) turns a checkpoint of any kind into a `Checkpoint` of such tensors; whatever works on
checkpoints (merge, verify, diff, convert) knows no other form.

D: dimensions of a tensor. Offsets and lengths of files are in bytes, those of tensors in elements.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

CHUNK_BYTES = 16 * 2**20
"""Largest block that `chunks` yields, in bytes of the stored dtype."""


class NamedTensor(Protocol):
    """One whole tensor of a checkpoint, wherever it comes from."""

    @property
    def name(self) -> str:
        """Its name in the model."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor, [D]."""
        ...

    @property
    def nbytes(self) -> int:
        """Of the whole tensor, in its stored dtype."""
        ...

    def read(self) -> Tensor:
        """Return the whole tensor, in memory of its own."""
        ...

    def chunks(self, num_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """Yield the elements in C order as flat tensors of at most `num_bytes` each; their memory may be used again."""
        ...


@dataclass(frozen=True)
class Piece:
    """A block of a tensor that lies in one file, contiguous and in C order."""

    file: Path
    offset: int
    """Of its first byte in the file."""
    start: tuple[int, ...]
    """Index of its first element in the whole tensor, [D]."""
    shape: tuple[int, ...]
    """[D]; a piece may be empty."""

    @property
    def size(self) -> int:
        """Return how many elements it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose bytes lie in files, in pieces that together are the whole of it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Return its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def renamed(self, name: str) -> StoredTensor:
        """Return the same under another name."""
        return replace(self, name=name)

    def missing(self) -> int:
        """Return how many of its elements lie in no piece; pieces are taken not to overlap."""
        return math.prod(self.shape) - sum(piece.size for piece in self.pieces)

    def read(self) -> Tensor:
        """Return the whole tensor; raises OSError or EOFError where a file is gone or too short."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        if self.in_rows() is not None:
            flat, at = whole.view(-1), 0
            for chunk in self.chunks():
                flat[at : at + len(chunk)] = chunk
                at += len(chunk)
            return whole
        for piece in self.pieces:
            into = whole[tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape, strict=True))]
            for block in self._blocks(piece, piece.size * self.dtype.itemsize):
                into.copy_(block.view(piece.shape))
        return whole

    def chunks(self, num_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """Yield its elements in C order, without ever holding more than one block where the pieces are whole rows."""
        pieces = self.in_rows()
        if pieces is None:
            yield from self.read().view(-1).split(max(1, num_bytes // self.dtype.itemsize))
            return
        for piece in pieces:
            yield from self._blocks(piece, num_bytes)

    def in_rows(self) -> Sequence[Piece] | None:
        """Return the pieces in order where each spans all dimensions but the first, so that bytes follow each other."""
        if any(piece.shape[1:] != self.shape[1:] or any(piece.start[1:]) for piece in self.pieces):
            return None
        return sorted((piece for piece in self.pieces if piece.size), key=lambda piece: piece.start)

    def _blocks(self, piece: Piece, num_bytes: int) -> Iterator[Tensor]:
        """Yield a piece's elements as flat tensors over one buffer."""
        left = piece.size * self.dtype.itemsize
        buffer = bytearray(min(left, max(num_bytes // self.dtype.itemsize, 1) * self.dtype.itemsize))
        with piece.file.open("rb", buffering=0) as file:
            at = piece.offset
            while left:
                view = memoryview(buffer)[: min(left, len(buffer))]
                _read_into(file.fileno(), view, at, piece.file)
                yield torch.frombuffer(view, dtype=self.dtype)
                at, left = at + len(view), left - len(view)


@dataclass(frozen=True)
class DerivedTensor:
    """A tensor that is computed from others when it is read: a part, a sum, another order of rows."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    """Returns it whole; what it reads for that is in memory meanwhile."""

    @property
    def nbytes(self) -> int:
        """Return its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Compute it."""
        return self.make()

    def chunks(self, num_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """Yield its elements in C order."""
        yield from self.make().contiguous().view(-1).split(max(1, num_bytes // self.dtype.itemsize))


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: what PEFT's `adapter_config.json` says, and the tensors under PEFT's names."""

    settings: Mapping[str, object]
    tensors: Mapping[str, NamedTensor]


@dataclass(frozen=True)
class Contents:
    """What a part of a checkpoint is found to hold."""

    tensors: Mapping[str, NamedTensor]
    facts: Mapping[str, str | int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Part(Mapping[str, NamedTensor]):
    """Tensors beside the weights, whose files are not opened before somebody looks; that may raise what readers do."""

    def __init__(self, read: Callable[[], Contents]) -> None:
        self._read = read

    @cached_property
    def contents(self) -> Contents:
        """Return the tensors with what is to be said of them."""
        return self._read()

    def __getitem__(self, name: str) -> NamedTensor:
        return self.contents.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.contents.tensors)

    def __len__(self) -> int:
        return len(self.contents.tensors)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any kind, as named tensors in files."""

    kind: str
    """Key in `kinds.KINDS`."""
    path: Path
    tensors: Mapping[str, NamedTensor]
    """The model's weights whole, by their Hugging Face names."""
    hf_folder: Path | None = None
    """Where config, generation config and tokenizer lie."""
    adapter: Adapter | None = None
    others: Mapping[str, Mapping[str, NamedTensor]] = field(default_factory=dict)
    """What is kept beside the weights, by part: `optimizer`, `random_state`, another role's weights, …

    One in files of its own is a `Part`.
    """
    facts: Mapping[str, str | int] = field(default_factory=dict)
    """What a person may want to know: step, ranks, layout, versions."""
    notes: tuple[str, ...] = ()
    """What was found odd and is no fault."""
    files: tuple[Path, ...] = ()
    """Every file that was read or is referred to."""


def _read_into(descriptor: int, view: memoryview, offset: int, file: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise EOFError(f"{file} ends at byte {offset + done}, before a tensor that should be there")
        done += count
