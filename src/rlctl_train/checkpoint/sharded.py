"""Named tensors to and from a folder with torch.distributed.checkpoint, each rank its own shards.

Works in one process without a process group, and loads into another number of ranks than it was saved from.
Nothing is unpickled but torch's own description of the shards: everything stored is a tensor.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load

from rlctl_train.checkpoint.shares import agree, alone_is_fine, seal
from rlctl_train.config.errors import FAILED, UserError

METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = frozenset(
    {
        (METADATA, "BytesStorageMetadata"),
        (METADATA, "ChunkStorageMetadata"),
        (METADATA, "Metadata"),
        (METADATA, "MetadataIndex"),
        (METADATA, "StorageMeta"),
        (METADATA, "TensorProperties"),
        (METADATA, "TensorStorageMetadata"),
        (METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    }
)
"""What a description of shards refers to, besides dtypes."""


def save_sharded(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write tensors; a DTensor's shards come from all ranks, a plain tensor from one. Every rank must call."""
    written = agree(tensors, folder).write()
    everyone: list[Any] = [written]
    if dist.is_initialized() and dist.get_world_size() > 1:
        first = dist.get_rank() == 0
        everyone = [None] * dist.get_world_size()
        dist.gather_object(written, everyone if first else None)
        if first:
            seal(folder, everyone)
        dist.barrier()
    else:
        seal(folder, everyone)


def load_sharded(tensors: dict[str, Tensor], folder: Path) -> None:
    """Read into tensors, in place. Every rank must call; names that the folder lacks are an error."""
    missing = sorted(set(tensors) - stored_names(folder))
    if missing:
        raise UserError(
            f"the checkpoint in {folder} lacks {len(missing)} tensors, among them {missing[0]!r}",
            "resume with the model and algorithm it was saved with",
            exit_code=FAILED,
        )
    with alone_is_fine():
        load(tensors, storage_reader=Reader(folder), no_dist=not dist.is_initialized())


def stored_names(folder: Path) -> set[str]:
    """Return the names of the tensors in a folder."""
    return set(_read_description(folder).state_dict_metadata)


def _read_description(folder: Path) -> Metadata:
    """Return torch's description of a folder's shards; raises UnpicklingError where it refers to anything else."""
    with (folder / ".metadata").open("rb") as file:
        return _ShardDescription(file).load()


class Reader(FileSystemReader):
    """A reader that trusts no pickle: torch's own unpickles whatever the metadata file asks for."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = _read_description(Path(self.path))
        self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


class _ShardDescription(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        is_dtype = module_name == "torch" and isinstance(vars(torch).get(global_name), torch.dtype)
        if not is_dtype and (module_name, global_name) not in ALLOWED:
            raise pickle.UnpicklingError(f"a checkpoint may not refer to {module_name}.{global_name}")
        return super().find_class(module_name, global_name)
