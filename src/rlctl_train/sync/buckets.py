"""Weights on their way from trainer to rollout: cut into buckets and packed for the object store."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlctl_train.checksum import Checksum, checksum

__all__ = ["Bucket", "Checksum", "PackedBucket", "buckets", "checksum", "pack", "unpack"]

Bucket = list[tuple[str, Tensor]]
PackedBucket = list[tuple[str, Any]]


def buckets(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[Bucket]:
    """Group a stream of named tensors into buckets of at most `max_bytes`; a larger tensor travels alone.

    Lazy: no more than one bucket and one tensor exist at a time.
    """
    bucket: Bucket = []
    used = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if bucket and used + size > max_bytes:
            yield bucket
            bucket, used = [], 0
        bucket.append((name, tensor))
        used += size
        if used >= max_bytes:
            # A large tensor is gone before the next one is gathered.
            yield bucket
            bucket, used = [], 0
    if bucket:
        yield bucket


def pack(bucket: Bucket, dtype: torch.dtype) -> PackedBucket:
    """Return the bucket cast to `dtype` as arrays in host memory, which Ray passes on without copying."""
    return [(name, _to_array(tensor.detach().to(dtype))) for name, tensor in bucket]


def unpack(bucket: PackedBucket) -> Bucket:
    """Return the tensors of a packed bucket; they share its memory and must not be written to."""
    with warnings.catch_warnings():
        # Arrays out of the object store are read-only, which torch warns about and nobody writes to.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return [(name, _to_tensor(array)) for name, array in bucket]


def _to_array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.cpu().contiguous()
    # NumPy has no bfloat16: its bits travel as unsigned 16-bit integers, which no weight is.
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _to_tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
