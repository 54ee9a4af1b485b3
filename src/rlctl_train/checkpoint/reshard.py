"""A checkpoint of ours for another number of ranks: rewritten tensor by tensor, each rank's part in a file of its own.

Training goes on from a checkpoint of any number of ranks as it is; this is for moving one in parts, each to the
machine that needs it. Values are copied, never computed: a resharded checkpoint trains on as its source does.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from rlctl_train.checkpoint.manifest import MANIFEST, is_complete, make_manifest, read_manifest
from rlctl_train.checkpoint.sharded import Reader
from rlctl_train.checkpoint.shares import ALGORITHM, Written, hashed, seal, tensors_of, told_of
from rlctl_train.checkpoint.store import sync, sync_tree
from rlctl_train.config.errors import FAILED, UserError
from rlctl_train.config.layout import write_json

SHARDED_PREFIX, SHARDED_SUFFIXES = "model.", (".exp_avg", ".exp_avg_sq")
"""Tensors that ranks share by rows, as FSDP2 does: weights and their moments. Rank 0 has the others whole."""

Checksums = Mapping[tuple[str, int], str]
"""(file in the folder of a role, offset) -> checksum of the piece there."""


def reshard(source: Path, target: Path, num_ranks: int) -> None:
    """Write the checkpoint in the step folder `source` as `num_ranks` ranks would have written it, into `target`.

    In memory there is one whole tensor at a time, and one stored piece of it. `target` appears when all of it has
    reached the disk, with a manifest of its own. Raises UserError where the source is damaged or not one of ours, or
    the target is there already.
    """
    manifest = _manifest_of(source, target, num_ranks)
    aside = target.with_name(f".{target.name}.writing")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        written = {}
        for role in sorted(path.parent.name for path in source.glob("*/.metadata")):
            sums = _checksums(manifest, role)
            written[role] = _reshard_role(source / role, aside / role, num_ranks, sums)
        for path in source.iterdir():
            if path.is_file() and path.name != MANIFEST:
                shutil.copy2(path, aside)
        kept = {key: value for key, value in manifest.items() if key not in ("files", "step")}
        more = {**kept, "tensors": tensors_of(written)}
        write_json(aside / MANIFEST, make_manifest(aside, manifest["step"], told_of(written), more))
        sync_tree(aside)
        aside.rename(target)
        sync(target.parent)
    except OSError as error:
        raise UserError(
            f"{target} could not be written: {error.strerror or error}",
            "free space there or make it writable; the source is as it was",
            exit_code=FAILED,
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _manifest_of(source: Path, target: Path, num_ranks: int) -> dict[str, Any]:
    """Return the source's manifest; refuse what cannot be done."""
    if num_ranks < 1:
        raise UserError(f"a checkpoint of {num_ranks} ranks cannot be", "ask for one rank or more")
    if target.exists():
        raise UserError(f"{target} is there already", "name a folder that is not, or remove this one")
    manifest = read_manifest(source)
    if manifest is None or "tensors" not in manifest:
        raise UserError(f"{source} is no checkpoint of rlctl", "name a folder step_NNNNNN of a run's checkpoints")
    if not is_complete(source):
        raise UserError(
            f"{source} is damaged: a file is missing, or not of its listed size or checksum",
            "name another step of the run",
            exit_code=FAILED,
        )
    return manifest


def _reshard_role(source: Path, target: Path, num_ranks: int, sums: Checksums) -> list[Written]:
    """Rewrite the tensors of one role."""
    target.mkdir()
    described = Reader(source).read_metadata()
    made: dict[str, TensorStorageMetadata] = {}
    results: list[list[WriteResult]] = [[] for _ in range(num_ranks)]
    with ExitStack() as open_files:
        streams = [open_files.enter_context((target / _file(rank)).open("wb")) for rank in range(num_ranks)]
        for name, entry in described.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)  # the reader lets nothing else through
            whole = _read(source, name, entry, described.storage_data, sums)
            chunks = []
            for rank, (start, part) in enumerate(_parts(name, whole, num_ranks)):
                chunks.append(ChunkStorageMetadata(torch.Size(start), part.shape))
                results[rank].append(_append(streams[rank], _file(rank), MetadataIndex(name, start), part))
            made[name] = TensorStorageMetadata(entry.properties, entry.size, chunks)
    metadata = Metadata(dict(made), planner_data=described.planner_data)
    written = [
        Written(results[rank], *hashed(target, results[rank], _file(rank)), 0.0, metadata if rank == 0 else None)
        for rank in range(num_ranks)
    ]
    seal(target, written)
    return written


def _read(
    folder: Path,
    name: str,
    entry: TensorStorageMetadata,
    places: Mapping[MetadataIndex, _StorageInfo],
    sums: Checksums,
) -> Tensor:
    """Return a whole tensor; its pieces are held to their checksums."""
    whole = torch.empty(entry.size, dtype=entry.properties.dtype)
    for chunk in entry.chunks:
        place = places[MetadataIndex(name, chunk.offsets)]
        file = folder / place.relative_path
        with file.open("rb") as stream:
            stream.seek(place.offset)
            stored = stream.read(place.length)
        if hashlib.new(ALGORITHM, stored).hexdigest() != sums.get((place.relative_path, place.offset)):
            raise UserError(
                f"{file} is damaged: {name} does not have the checksum of the manifest",
                "name another step of the run",
                exit_code=FAILED,
            )
        into = whole[tuple(slice(a, a + n) for a, n in zip(chunk.offsets, chunk.sizes, strict=True))]
        into.copy_(torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True))
    return whole


def _parts(name: str, whole: Tensor, num_ranks: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Yield where each rank's part begins, and the part; ranks that have none come last."""
    if whole.ndim == 0 or not (name.startswith(SHARDED_PREFIX) or name.endswith(SHARDED_SUFFIXES)):
        yield (0,) * whole.ndim, whole
        return
    start = 0
    for part in whole.chunk(num_ranks):
        yield (start, *(0,) * (whole.ndim - 1)), part
        start += len(part)


def _append(stream: IO[bytes], file: str, index: MetadataIndex, part: Tensor) -> WriteResult:
    offset = stream.tell()
    torch.save(part.clone(), stream)  # a view would be stored with all that it is a view of
    length = stream.tell() - offset
    return WriteResult(index, length, _StorageInfo(file, offset, length))


def _checksums(manifest: Mapping[str, Any], role: str) -> dict[tuple[str, int], str]:
    pieces = (piece for name, held in manifest["tensors"].items() if name.startswith(f"{role}/") for piece in held)
    return {(piece["file"].removeprefix(f"{role}/"), piece["offset"]): piece["checksum"] for piece in pieces}


def _file(rank: int) -> str:
    return f"__{rank}_0.distcp"
