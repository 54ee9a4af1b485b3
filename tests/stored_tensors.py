"""Assertions about what a reader of checkpoints gives."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlctl_train.checkpoint.stored import NamedTensor

MIXED_BYTES = 24
"""A size of chunks at which tensors of a test come in several."""


def assert_same(found: Mapping[str, NamedTensor], expected: Mapping[str, Tensor]) -> None:
    """Compare names, dtypes, shapes and every bit, read whole and read in chunks."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        stored = found[name]
        assert (stored.name, stored.dtype, stored.shape) == (name, tensor.dtype, tuple(tensor.shape))
        assert stored.nbytes == tensor.nbytes
        assert same_bits(stored.read(), tensor), name
        chunks = [chunk.clone() for chunk in stored.chunks(MIXED_BYTES)]
        assert all(chunk.nbytes <= MIXED_BYTES for chunk in chunks)
        assert same_bits(torch.cat([torch.empty(0, dtype=tensor.dtype), *chunks]), tensor.reshape(-1)), name


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors are the same, NaN and all."""
    a, b = a.contiguous(), b.contiguous()
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
