"""Folders of torch.distributed.checkpoint as tensors that stay in them: each shard is a torch file within a file."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from rlctl_train.checkpoint.inert_pickle import damaged, refused
from rlctl_train.checkpoint.sharded import read_description
from rlctl_train.checkpoint.stored import NamedTensor
from rlctl_train.checkpoint.torch_file import FileTensor, assembled, read_torch_file


def read_dcp(folder: Path) -> tuple[dict[str, NamedTensor], list[str]]:
    """Return the tensors of a folder by name, and the names of what else it holds."""
    description = _description(folder)
    stored: Mapping[MetadataIndex, Any] = description.storage_data or {}
    tensors: dict[str, NamedTensor] = {}
    others: list[str] = []
    for name, entry in description.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            tensors[name] = _tensor(name, entry, stored, folder)
        else:
            others.append(name)
    return tensors, others


def _description(folder: Path) -> Metadata:
    path = folder / ".metadata"
    try:
        description = read_description(folder)
    except pickle.UnpicklingError as error:
        if "may not refer to" in str(error):
            raise refused(str(path), str(error).partition("may not ")[2]) from error
        raise damaged(str(path), f"its pickle makes no sense ({error})") from error
    except (ValueError, TypeError, AttributeError, LookupError, EOFError, ImportError) as error:
        raise damaged(str(path), f"its pickle makes no sense ({error})") from error
    if not isinstance(description, Metadata):
        raise damaged(str(path), "it does not describe shards")
    return description


def _tensor(name: str, entry: TensorStorageMetadata, stored: Mapping[MetadataIndex, Any], folder: Path) -> NamedTensor:
    shape = tuple(entry.size)
    parts: list[tuple[tuple[int, ...], FileTensor]] = []
    for chunk in entry.chunks:
        info = stored.get(MetadataIndex(name, chunk.offsets))
        if 0 in chunk.sizes:
            continue
        if info is None:
            raise damaged(str(folder / ".metadata"), f"it does not say where {name} {list(chunk.offsets)} lies")
        part = _part(name, info, folder)
        if (part.shape, part.dtype) != (tuple(chunk.sizes), entry.properties.dtype):
            raise damaged(
                str(part.file), f"{name} is {list(part.shape)} of {part.dtype} there, but {list(chunk.sizes)} of "
                f"{entry.properties.dtype} by the description of the shards",
            )  # fmt: skip
        parts.append((tuple(chunk.offsets), part))
    if sum(math.prod(part.shape) for _, part in parts) != math.prod(shape):
        raise damaged(str(folder / ".metadata"), f"the shards of {name} do not make up {list(shape)}")
    _check_places(name, shape, parts, folder)
    return assembled(name, entry.properties.dtype, shape, parts)


def _check_places(
    name: str, shape: tuple[int, ...], parts: list[tuple[tuple[int, ...], FileTensor]], folder: Path
) -> None:
    for start, part in parts:
        if len(start) != len(shape) or any(a + n > s for a, n, s in zip(start, part.shape, shape, strict=True)):
            raise damaged(str(folder / ".metadata"), f"a shard of {name} lies outside of {list(shape)}")


def _part(name: str, info: Any, folder: Path) -> FileTensor:
    if Path(info.relative_path).name != info.relative_path:
        raise refused(str(folder / ".metadata"), f"refer to a file outside its folder, {info.relative_path}")
    file = folder / info.relative_path
    if info.transform_descriptors:
        raise refused(str(file), f"be compressed ({', '.join(info.transform_descriptors)})")
    if not file.is_file():
        raise damaged(str(folder), f"{info.relative_path} is missing, in which {name} lies")
    held = read_torch_file(file, info.offset, info.length)
    if not isinstance(held, FileTensor):
        raise damaged(str(file), f"there is no tensor where {name} should be")
    return held
