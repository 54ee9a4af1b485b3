"""The zip archives that `torch.save` writes: their records, where each lies in the file, and whether it is whole.

Records are stored without compression, so that a tensor's bytes are a range of the file. An archive may itself be a
range of a larger file, as torch's sharded checkpoints have them.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from rlctl_train.checkpoint.inert_pickle import Name, damaged, refused
from rlctl_train.config.errors import FAILED, UserError

MAGIC = b"PK\x03\x04"
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Magic number, and the lengths of the name and of the extra field that lie between it and the data."""
CRC_BLOCK = 2**22
"""Bytes that are read at once to check a record."""
STORAGES = {
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "storage.UntypedStorage": torch.uint8,
}


@dataclass(frozen=True)
class Storage:
    """A record of a file as elements of one type."""

    dtype: torch.dtype
    file: Path
    offset: int
    num_bytes: int
    checksum: int


def is_torch_zip(path: Path) -> bool:
    """Say whether a file is a zip archive, as torch has written since version 1.6."""
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def damaged_records(path: Path) -> list[str]:
    """Return the records of a zip archive whose bytes do not have the CRC-32 that the archive says, in its order."""
    bad: list[str] = []
    with path.open("rb") as file:
        archive = Archive(file, path, str(path), 0, os.fstat(file.fileno()).st_size)
        for entry in archive.entries():
            start = archive.data_offset(entry)
            if _crc(file, start, entry.file_size) != entry.CRC:
                bad.append(entry.filename)
    return bad


class Archive:
    """The zip archive in a range of a file; every record is stored as it is, without compression."""

    def __init__(self, file: BinaryIO, path: Path, where: str, offset: int, length: int) -> None:
        self._file, self._path, self._where, self._offset, self._length = file, path, where, offset, length
        if offset + length > os.fstat(file.fileno()).st_size:
            raise damaged(where, f"it ends before the {length} bytes that should be there")
        try:
            with zipfile.ZipFile(_Window(file, offset, length)) as archive:
                self._entries = {entry.filename: entry for entry in archive.infolist()}
                num_entries = len(archive.infolist())
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
            raise damaged(where, f"no zip archive ({error})") from error
        if len(self._entries) != num_entries:
            raise refused(where, "have two records of one name")
        self._prefix = self._find_prefix()
        if self._has("constants.pkl"):
            raise refused(where, "be a TorchScript program")
        if self._has("byteorder") and self.record("byteorder") != b"little":
            raise UserError(
                f"{where} was written on a big-endian machine", "save it again on a little-endian one", exit_code=FAILED
            )

    def entries(self) -> list[zipfile.ZipInfo]:
        return list(self._entries.values())

    def pickle(self) -> bytes:
        return self.record("data.pkl")

    def record(self, name: str) -> bytes:
        entry = self._entry(name)
        self._file.seek(self.data_offset(entry))
        return self._file.read(entry.file_size)

    def storage(self, asked: Any) -> Storage:
        """Answer a pickle's request for a storage: ("storage", type, record, device, number of elements)."""
        if type(asked) is not tuple or len(asked) != 5 or asked[0] != "storage" or type(asked[1]) is not Name:
            raise damaged(self._where, "its pickle asks for something that is no storage")
        _, kind, key, _, _ = asked
        dtype = STORAGES.get(kind.text.removeprefix("torch."))
        if dtype is None:
            raise refused(self._where, f"hold a storage of type {kind.text}")
        entry = self._entry(f"data/{key}")
        return Storage(dtype, self._path, self.data_offset(entry), entry.file_size, entry.CRC)

    def data_offset(self, entry: zipfile.ZipInfo) -> int:
        """Return where a record's bytes begin in the file; all of them lie inside the archive."""
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise refused(self._where, f"compress or encrypt its record {entry.filename}")
        header = os.pread(self._file.fileno(), LOCAL_HEADER.size, self._offset + entry.header_offset)
        if len(header) < LOCAL_HEADER.size or header[:4] != MAGIC or entry.header_offset < 0:
            raise damaged(self._where, f"its record {entry.filename} is not where it should be")
        _, name_length, extra_length = LOCAL_HEADER.unpack(header)
        start = entry.header_offset + LOCAL_HEADER.size + name_length + extra_length
        if start + entry.file_size > self._length:
            raise damaged(self._where, f"its record {entry.filename} lies beyond its end")
        return self._offset + start

    def _find_prefix(self) -> str:
        found = [name for name in self._entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(found) != 1:
            raise damaged(self._where, "it is a zip archive, but not one of torch's")
        return found[0].removesuffix("data.pkl")

    def _has(self, name: str) -> bool:
        return self._prefix + name in self._entries

    def _entry(self, name: str) -> zipfile.ZipInfo:
        if not self._has(name):
            raise damaged(self._where, f"it has no record {name}")
        return self._entries[self._prefix + name]


class _Window(io.RawIOBase):
    """A range of a file, to be read as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length, self._at = file.fileno(), offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("a negative place in a file")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._length - self._at)
        count = left if size is None or size < 0 else min(size, left)
        data = os.pread(self._descriptor, count, self._offset + self._at)
        self._at += len(data)
        return data


def _crc(file: BinaryIO, offset: int, num_bytes: int) -> int:
    value = 0
    for at in range(offset, offset + num_bytes, CRC_BLOCK):
        value = zlib.crc32(os.pread(file.fileno(), min(CRC_BLOCK, offset + num_bytes - at), at), value)
    return value
