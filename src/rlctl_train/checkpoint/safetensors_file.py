"""Safetensors files as tensors that stay in them: the header is read and checked, the data is not touched."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch

from rlctl_train.checkpoint.inert_pickle import damaged
from rlctl_train.checkpoint.stored import Piece, StoredTensor

MOST_HEADER_BYTES = 10**8
"""The format's own limit."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name; raises UserError where header and file do not agree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= min(size - 8, MOST_HEADER_BYTES):
            raise damaged(str(path), "it does not begin with a safetensors header")
        header = file.read(length)
    try:
        entries = json.loads(header)
        tensors = {name: _tensor(name, entry, path, 8 + length) for name, entry in _items(entries)}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(str(path), f"its header makes no sense ({error})") from error
    _check_ranges(path, tensors, size)
    return tensors


def _items(entries: Any) -> list[tuple[str, Any]]:
    if not isinstance(entries, dict):
        raise TypeError("no table of tensors")
    return [(name, entry) for name, entry in entries.items() if name != "__metadata__"]


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> StoredTensor:
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name} has a shape or an offset that no tensor has")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {end - begin} bytes, but its shape needs {math.prod(shape) * dtype.itemsize}")
    return StoredTensor(name, dtype, shape, (Piece(path, data_start + begin, (0,) * len(shape), shape),))


def _check_ranges(path: Path, tensors: dict[str, StoredTensor], file_bytes: int) -> None:
    """Refuse tensors that lie beyond the file or over one another."""
    end, before = 0, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.pieces[0].offset, tensor.nbytes)):
        offset = tensor.pieces[0].offset
        if offset + tensor.nbytes > file_bytes:
            raise damaged(str(path), f"{tensor.name} ends at byte {offset + tensor.nbytes}, the file at {file_bytes}")
        if offset < end and tensor.nbytes:
            raise damaged(str(path), f"{tensor.name} and {before} lie over one another")
        end, before = offset + tensor.nbytes, tensor.name
