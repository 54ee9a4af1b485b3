"""Folders of torch.distributed.checkpoint as tensors that stay in them: each chunk is a torch file within a file.

The description of a folder, `.metadata`, is read by `inert_pickle` as those files are: nothing is made and nothing is
called, whoever wrote it. Offsets and lengths are in bytes of a file, those of chunks in elements.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlctl_train.checkpoint.inert_pickle import Instance, Known, damaged, read_pickle, refused
from rlctl_train.checkpoint.stored import NamedTensor, StoredTensor
from rlctl_train.checkpoint.torch_file import DTYPES, FileTensor, assembled, checked_sizes, read_torch_part
from rlctl_train.config.errors import UserError

DESCRIPTION = ".metadata"
CLASSES = frozenset({
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
    "TensorStorageMetadata", "_MEM_FORMAT_ENCODING", "_StorageInfo",
    "BytesIOWriteData", "MCoreMetadata", "MCoreSavePlan", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
})  # fmt: skip
"""Classes that a description refers to; those of the last row Megatron keeps to save faster next time."""
MODULES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
CALLS: Mapping[str, Any] = {
    "torch.Size": checked_sizes,
    "torch.serialization._get_layout": lambda *_: None,
    "pathlib.PosixPath": lambda *_: None,
    "pathlib._local.PosixPath": lambda *_: None,
    # Before Python 3.11.4 members of an enum were pickled as attributes of it.
    "builtins.getattr": lambda *_: None,
    "__builtin__.getattr": lambda *_: None,
}


def read_dcp(folder: Path, *, allow_missing: bool = False) -> tuple[dict[str, NamedTensor], list[str]]:
    """Return the tensors of a folder by name, and the names of what else it holds.

    With `allow_missing`, a tensor that the description lists only chunks of is one with `missing()` elements, if its
    bytes can be used as they are. Raises UserError for that otherwise, and for all that is damaged or no plain data.
    """
    tensors, others = _described(folder)
    found = _found(folder, tensors)
    return {name: _tensor(folder, name, of, found[name], allow_missing) for name, of in tensors.items()}, others


@dataclass(frozen=True)
class _Place:
    """Where in a folder a chunk lies."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class _Described:
    """What a description says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Mapping[tuple[int, ...], tuple[int, ...]]
    """Index of the first element -> shape, of each chunk that has elements."""
    places: Mapping[tuple[int, ...], _Place]
    """By index of the first element; chunks may be without one."""


def _described(folder: Path) -> tuple[dict[str, _Described], list[str]]:
    """Return what the description says of tensors, and the names of what is none."""
    path = folder / DESCRIPTION
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "name the folder of a checkpoint") from error
    description = read_pickle(data, Known(CALLS, _is_class, DTYPES.__contains__), _no_storage, str(path))
    try:
        entries = description.fields["state_dict_metadata"]
        stored = _by_name(description.fields["storage_data"])
        tensors = {
            str(name): _entry(entry, stored.get(str(name), {}), path)
            for name, entry in entries.items()
            if entry.kind == "TensorStorageMetadata"
        }
        return tensors, [str(name) for name in entries if str(name) not in tensors]
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise damaged(str(path), f"it does not describe shards ({error})") from error


def _is_class(name: str) -> bool:
    return name.startswith(MODULES) and name.rpartition(".")[2] in CLASSES


def _no_storage(_: object) -> None:
    raise ValueError("it asks for a storage")


def _by_name(stored: Mapping[Any, Instance]) -> Mapping[str, dict[tuple[int, ...], Instance]]:
    """Return what is said of where chunks are, by name and by the index of their first element."""
    found: dict[str, dict[tuple[int, ...], Instance]] = defaultdict(dict)
    for index, info in stored.items():
        name, start = index.fields["fqn"], index.fields.get("offset")
        if type(name) is str and start is not None:
            found[name][checked_sizes(start)] = info
    return found


def _entry(entry: Instance, stored: Mapping[tuple[int, ...], Instance], path: Path) -> _Described:
    shape = checked_sizes(entry.fields["size"])
    pairs = ((chunk.fields["offsets"], chunk.fields["sizes"]) for chunk in entry.fields["chunks"])
    chunks = {checked_sizes(start): checked_sizes(sizes) for start, sizes in pairs}
    for start, sizes in chunks.items():
        if not len(start) == len(sizes) == len(shape) or any(
            a + n > whole for a, n, whole in zip(start, sizes, shape, strict=True)
        ):
            raise ValueError(f"a chunk of {list(sizes)} at {list(start)} lies outside of {list(shape)}")
    full = {start: sizes for start, sizes in chunks.items() if math.prod(sizes)}
    dtype = DTYPES[entry.fields["properties"].fields["state"][0].text]
    return _Described(dtype, shape, full, {start: _place(stored[start], path) for start in full if start in stored})


def _place(info: Instance, path: Path) -> _Place:
    file, packed = info.fields["relative_path"], info.fields.get("transform_descriptors")
    if Path(file).name != file:
        raise refused(str(path), f"refer to a file outside its folder, {file}")
    if packed:
        raise refused(str(path.parent / file), f"be compressed ({', '.join(packed)})")
    return _Place(file, *checked_sizes((info.fields["offset"], info.fields["length"])))


def _found(folder: Path, tensors: Mapping[str, _Described]) -> dict[str, dict[tuple[int, ...], FileTensor]]:
    """Return the chunks that have a place, by name and by the index of their first element; a file is opened once."""
    asked: dict[str, list[tuple[_Place, str, tuple[int, ...]]]] = defaultdict(list)
    for name, of in tensors.items():
        for start, place in of.places.items():
            asked[place.file].append((place, name, start))
    found: dict[str, dict[tuple[int, ...], FileTensor]] = {name: {} for name in tensors}
    for file, of_file in sorted(asked.items()):
        for name, start, chunk in _of_file(folder / file, of_file):
            found[name][start] = chunk
    return found


def _of_file(
    path: Path, asked: list[tuple[_Place, str, tuple[int, ...]]]
) -> Iterator[tuple[str, tuple[int, ...], FileTensor]]:
    if not path.is_file():
        raise damaged(str(path.parent), f"{path.name} is missing, in which {asked[0][1]} lies")
    with path.open("rb") as file:
        for place, name, start in sorted(asked, key=lambda chunk: chunk[0].offset):
            held = read_torch_part(file, path, place.offset, place.length)
            if not isinstance(held, FileTensor):
                raise damaged(str(path), f"there is no tensor where {name} should be")
            yield name, start, held


def _tensor(
    folder: Path, name: str, of: _Described, found: Mapping[tuple[int, ...], FileTensor], allow_missing: bool
) -> NamedTensor:
    for start, part in found.items():
        if (part.shape, part.dtype) != (of.chunks[start], of.dtype):
            raise damaged(
                str(part.file), f"{name} is {list(part.shape)} of {part.dtype} there, but {list(of.chunks[start])} of "
                f"{of.dtype} by the description of the shards",
            )  # fmt: skip
    tensor = assembled(name, of.dtype, of.shape, list(found.items()))
    missing = math.prod(of.shape) - sum(math.prod(part.shape) for part in found.values())
    if missing and not (allow_missing and missing > 0 and isinstance(tensor, StoredTensor)):
        raise damaged(str(folder / DESCRIPTION), f"the shards of {name} do not make up {list(of.shape)}")
    return tensor
