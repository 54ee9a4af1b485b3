"""Where the tensors of a folder of torch.distributed.checkpoint lie, chunk by chunk; no tensor is loaded to know it.

A folder holds a description (`.metadata`) and files of items one after the other, each item a file of torch's own
(a zip) with one chunk of one tensor. Of its pickles only numbers and names are taken.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from rlctl_train.checkpoint.sharded import read_description
from rlctl_train.checkpoint.stored import Piece, StoredTensor
from rlctl_train.config.errors import FAILED, UserError

MANGLED = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError)
"""What unpickling raises for bytes that are no pickle of the expected form."""
LOCAL_HEADER_BYTES = 30
"""Of a zip record, before its name and its extra field, whose lengths are its last two numbers of two bytes."""


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a folder by name; a chunk that the folder does not list leaves elements missing.

    Raises UserError where the description is damaged or refers to code, or where a file is gone, short or damaged.
    Objects that are no tensors are left out.
    """
    tensors, items = _described(folder)
    pieces: dict[str, list[Piece]] = {name: [] for name in tensors}
    for path, of_file in sorted(_by_file(items).items()):
        with _opened(path, of_file[0]) as file:
            for item in of_file:
                pieces[item.name].append(Piece(path, _data_offset(file, item), item.start, item.shape))
    return {
        name: StoredTensor(name, entry.properties.dtype, tuple(entry.size), tuple(pieces[name]))
        for name, entry in tensors.items()
    }


@dataclass(frozen=True)
class _Item:
    """One chunk of a tensor, as a blob in a file."""

    name: str
    dtype: torch.dtype
    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    offset: int
    length: int


@dataclass(frozen=True)
class _Layout:
    """How a blob's tensor lies in its storage, in elements."""

    record: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _described(folder: Path) -> tuple[dict[str, TensorStorageMetadata], list[_Item]]:
    """Return what the description says of tensors, and of their chunks."""
    path = folder / ".metadata"
    try:
        description = read_description(folder)
        places = {
            relative: _inside(folder, relative)
            for relative in {info.relative_path for info in description.storage_data.values()}
        }
        tensors = {
            name: entry
            for name, entry in description.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        return tensors, [item for name in tensors for item in _items(description, name, tensors[name], places)]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "name the folder of a checkpoint") from error
    except MANGLED as error:
        raise UserError(
            f"{path} does not describe tensors: {error}",
            "take the file from where the checkpoint was saved, and trust nothing else in the folder",
            exit_code=FAILED,
        ) from error


def _inside(folder: Path, relative: str) -> Path:
    path = folder / relative
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{relative!r} is outside the folder")
    return path


def _items(
    description: Metadata, name: str, entry: TensorStorageMetadata, places: Mapping[str, Path]
) -> Iterator[_Item]:
    for chunk in {chunk.offsets: chunk for chunk in entry.chunks}.values():
        info = description.storage_data.get(MetadataIndex(name, chunk.offsets))
        if info is None:
            continue
        if getattr(info, "transform_descriptors", None):  # older versions have no such field
            raise ValueError(f"{name!r} is packed by {info.transform_descriptors}")
        file, start, shape = places[info.relative_path], tuple(chunk.offsets), tuple(chunk.sizes)
        yield _Item(name, entry.properties.dtype, start, shape, file, info.offset, info.length)


def _by_file(items: Iterable[_Item]) -> dict[Path, list[_Item]]:
    files: dict[Path, list[_Item]] = defaultdict(list)
    for item in items:
        files[item.file].append(item)
    return files


def _opened(path: Path, first: _Item) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        what = f"{path}: {error.strerror}; it should hold {first.name!r} and others"
        raise UserError(what, "copy the file from where the checkpoint was saved", exit_code=FAILED) from error


def _data_offset(file: BinaryIO, item: _Item) -> int:
    """Return where in the file the first element of an item's tensor is."""
    blob = _Window(file, item.offset, item.length)
    try:
        with zipfile.ZipFile(blob) as archive:
            (description,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            layout = _LayoutReader(archive.open(description)).load()
            record = archive.getinfo(f"{description.removesuffix('.pkl')}/{layout.record}")
    except (zipfile.BadZipFile, OSError, NotImplementedError, *MANGLED) as error:
        raise _damaged(item, str(error)) from error
    begin = layout.offset * item.dtype.itemsize
    end = begin + torch.Size(item.shape).numel() * item.dtype.itemsize
    if layout.shape != item.shape or begin < 0 or end > record.file_size or record.compress_type != zipfile.ZIP_STORED:
        raise _damaged(item, f"a tensor {list(layout.shape)} of {record.file_size} bytes lies there")
    if not _is_contiguous(layout):
        raise _damaged(item, f"its dimensions lie in another order, with strides {list(layout.stride)}")
    blob.seek(record.header_offset + LOCAL_HEADER_BYTES - 4)
    lengths = blob.read(4)
    name_length, extra_length = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
    return item.offset + record.header_offset + LOCAL_HEADER_BYTES + name_length + extra_length + begin


def _is_contiguous(layout: _Layout) -> bool:
    expected = 1
    for length, stride in zip(reversed(layout.shape), reversed(layout.stride), strict=True):
        if length > 1 and stride != expected:
            return False
        expected *= length
    return True


def _damaged(item: _Item, why: str) -> UserError:
    return UserError(
        f"{item.file} does not hold {item.name!r} at byte {item.offset}: {why}",
        "copy the file from where the checkpoint was saved; its size and checksum will differ",
        exit_code=FAILED,
    )


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(min(len(buffer), max(0, self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _LayoutReader(pickle.Unpickler):
    """Reads how a tensor lies, and builds nothing."""

    def persistent_load(self, pid: Any, /) -> str:
        return str(pid[2])

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) in {
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_tensor_v3"),
        }:
            return _layout
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module_name in ("torch", "torch.storage") and global_name.endswith("Storage"):
            return None
        if module_name == "torch" and isinstance(vars(torch).get(global_name), torch.dtype):
            return None
        raise pickle.UnpicklingError(f"a tensor may not refer to {module_name}.{global_name}")


def _layout(storage: str, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object) -> _Layout:
    return _Layout(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))
