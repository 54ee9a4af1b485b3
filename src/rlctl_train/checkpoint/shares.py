"""One rank's share of a checkpoint: agreed upon by all ranks, copied to the host, written by itself, hashed.

Only `agree` communicates. What follows (`Share.write`) touches files alone, so that a thread may do it while the rank
trains on; whoever has the answers of all ranks then calls `seal`, in whichever process.
"""

from __future__ import annotations

import hashlib
import io
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from rlctl_train.device import synchronize

ALGORITHM = "sha256"
"""Of every checksum in a manifest. Hashing keeps up with a disk where the processor has instructions for it (1.8 GB/s a
core, against 0.9 of BLAKE2b and 4.2 of CRC-32), and unlike CRC-32 it also tells what was changed on purpose."""
BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class Piece:
    """A block of a tensor in a file, as the shard description places it: an archive of torch's with one tensor."""

    name: str
    file: str
    """Relative to the folder of the role."""
    offset: int
    bytes: int
    checksum: str


@dataclass(frozen=True)
class Written:
    """What one rank has written."""

    results: list[WriteResult]
    pieces: list[Piece]
    files: dict[str, dict[str, Any]]
    """Name in the folder of the role -> `bytes` and `sha256`."""
    seconds: float
    """Spent writing and hashing."""
    metadata: Metadata | None = None
    """What describes the tensors of all ranks; of rank 0 alone."""


@dataclass
class HostCopies:
    """Host memory that copies are made into, kept from one save to the next: fresh pages cost more than the copy."""

    _held: dict[MetadataIndex, Tensor] = field(default_factory=dict)

    def take(self, tensors: Mapping[MetadataIndex, Tensor]) -> dict[MetadataIndex, Tensor]:
        """Copy the tensors; what was copied before is overwritten."""
        kinds = set()
        for index, tensor in tensors.items():
            held = self._held.get(index)
            if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
                held = self._held[index] = torch.empty(tensor.shape, dtype=tensor.dtype)
            held.copy_(tensor, non_blocking=tensor.device.type != "cpu")
            kinds.add(tensor.device.type)
        for kind in kinds:
            synchronize(kind)
        return {index: self._held[index] for index in tensors}


@dataclass(frozen=True)
class Share:
    """What one rank has to write."""

    folder: Path
    plan: SavePlan
    tensors: Mapping[MetadataIndex, Tensor]
    metadata: Metadata | None
    """Of rank 0 alone."""

    def write(self) -> Written:
        """Write and hash the rank's file. Raises OSError, also where torch makes something else of it."""
        start = time.perf_counter()
        disk = _Disk()
        writer = FileSystemWriter(self.folder, per_thread_copy_ahead=0)
        writer.fs = disk
        try:
            results = writer.write_data(self.plan, _Held(self.tensors)).value()
        except RuntimeError as error:
            raise disk.error or error from error
        pieces, files = hashed(self.folder, results, _file_name(self.plan))
        return Written(results, pieces, files, time.perf_counter() - start, self.metadata)


def agree(tensors: Mapping[str, Tensor], folder: Path, copies: HostCopies | None = None) -> Share:
    """Agree with all ranks on who writes what; with `copies`, copy it so that the tensors may change at once.

    A DTensor's shards come from all ranks, a plain tensor from one. Every rank must call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    together = dist.is_initialized() and dist.get_world_size() > 1
    first = not together or dist.get_rank() == 0
    planner, writer = DefaultSavePlanner(), FileSystemWriter(folder)
    with alone_is_fine():
        planner.set_up_planner(dict(tensors), is_coordinator=first)
        plan, metadata = _share_out(planner, writer, planner.create_local_plan(), together, first)
    own = {item.index: _tensor(planner, item) for item in plan.items}
    return Share(folder, plan, own if copies is None else copies.take(own), metadata)


def seal(folder: Path, everyone: Sequence[Written]) -> None:
    """Write the description of the tensors, once all ranks have written: only then can they be loaded."""
    metadata = next(written.metadata for written in everyone if written.metadata is not None)
    FileSystemWriter(folder).finish(metadata, [written.results for written in everyone])


def hashed(folder: Path, results: Sequence[WriteResult], file: str) -> tuple[list[Piece], dict[str, dict[str, Any]]]:
    """Read a written file once, block by block; return the checksums of its pieces and of the whole."""
    whole, pieces = hashlib.new(ALGORITHM), []
    with (folder / file).open("rb") as stream:
        for result in sorted(results, key=lambda result: result.storage_data.offset):
            info = result.storage_data
            assert info.offset == stream.tell(), "pieces follow each other without gaps"
            checksum = hashlib.new(ALGORITHM)
            left = info.length
            while left:
                block = stream.read(min(left, BLOCK_BYTES))
                if not block:
                    raise EOFError(f"{folder / file} is shorter than what was written to it")
                whole.update(block)
                checksum.update(block)
                left -= len(block)
            pieces.append(Piece(result.index.fqn, file, info.offset, info.length, checksum.hexdigest()))
        while block := stream.read(BLOCK_BYTES):
            whole.update(block)
        size = stream.tell()
    return pieces, {file: {"bytes": size, ALGORITHM: whole.hexdigest()}}


def told_of(written: Mapping[str, list[Written]]) -> dict[str, dict[str, Any]]:
    """Return the manifest's entries of the files that ranks have written."""
    return {
        f"{role}/{name}": entry
        for role, everyone in written.items()
        for one in everyone
        for name, entry in one.files.items()
    }


def tensors_of(written: Mapping[str, list[Written]]) -> dict[str, list[dict[str, Any]]]:
    """Return the manifest's entries of the tensors that ranks have written."""
    tensors: dict[str, list[dict[str, Any]]] = {}
    for role, everyone in written.items():
        for piece in (piece for one in everyone for piece in one.pieces):
            tensors.setdefault(f"{role}/{piece.name}", []).append(
                {
                    "file": f"{role}/{piece.file}",
                    "offset": piece.offset,
                    "bytes": piece.bytes,
                    "checksum": piece.checksum,
                }
            )
    return dict(sorted(tensors.items()))


@contextmanager
def alone_is_fine() -> Iterator[None]:
    """Silence torch's remark that a process without a process group saves or loads by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _share_out(
    planner: DefaultSavePlanner, writer: FileSystemWriter, own: SavePlan, together: bool, first: bool
) -> tuple[SavePlan, Metadata | None]:
    """Have rank 0 turn everyone's plan into one without doubles; return this rank's part of it."""
    plans: list[Any] = [own]
    if together:
        plans = [None] * dist.get_world_size()
        dist.gather_object(own, plans if first else None)
    metadata, parts = None, [None]
    if first:
        made, metadata = planner.create_global_plan(plans)
        plans = writer.prepare_global_plan(made)
    if together:
        dist.scatter_object_list(parts, plans if first else None)
    else:
        parts = plans
    part = parts[0]
    assert part is not None
    return planner.finish_plan(part), metadata


def _tensor(planner: DefaultSavePlanner, item: Any) -> Tensor:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor), "everything stored is a tensor"
    return tensor.detach()


def _file_name(plan: SavePlan) -> str:
    """Return the one file that torch's writer makes of a plan."""
    return f"{plan.storage_data.prefix}0.distcp"


class _Held(DefaultSavePlanner):
    """Answers with the tensors at hand, whatever the model holds by now."""

    def __init__(self, tensors: Mapping[MetadataIndex, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._tensors[index]


class _Disk(FileSystem):
    """Remembers why the disk refused: torch's archive writer only says that it could not write."""

    error: OSError | None = None

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            yield _Stream(stream, self)


class _Stream(io.IOBase):
    """A file to write to; the first refusal is noted."""

    def __init__(self, raw: Any, disk: _Disk) -> None:
        self._raw, self._disk = raw, disk

    def write(self, data: Any) -> int:
        try:
            return self._raw.write(data)
        except OSError as error:
            self._disk.error = self._disk.error or error
            raise

    def tell(self) -> int:
        return self._raw.tell()

    def flush(self) -> None:
        self._raw.flush()

    def fileno(self) -> int:
        return self._raw.fileno()
