"""Checksums of named weights: order-independent, exact to the bit, computed on the device the tensors are on.

Both ends of a weight transfer import this: the sender hashes what it sends, the receiver what it holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

_CHUNK_WORDS = 1 << 20
"""Words hashed at one time: bounds the scratch memory to a few times 8 MiB."""
_GOLDEN = -7046029254386353131
"""2^64 divided by the golden ratio, made odd, as a signed 64-bit number."""
_WORD = (1 << 64) - 1


class Checksum:
    """A running checksum over named tensors, cast to `dtype` first; the order of `add` does not matter."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._digests: dict[str, str] = {}

    def add(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take named tensors in; a name seen before is replaced."""
        for name, tensor in tensors:
            self._digests[name] = tensor_digest(tensor, self._dtype)

    def merge(self, digests: dict[str, str]) -> None:
        """Take in digests made elsewhere by `tensor_digest`."""
        self._digests |= digests

    def hexdigest(self) -> str:
        """Return 32 hexadecimal digits over all names, shapes and values."""
        lines = "\n".join(f"{name} {digest}" for name, digest in sorted(self._digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()[:32]


def checksum(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> str:
    """Return the checksum of all `tensors` as cast to `dtype`."""
    running = Checksum(dtype)
    running.add(tensors)
    return running.hexdigest()


@torch.no_grad()
def tensor_digest(tensor: Tensor, dtype: torch.dtype) -> str:
    """Return the shape and a 64-bit hash of the values as cast to `dtype`.

    Integer arithmetic modulo 2^64, so the result depends neither on the device nor on the order of the
    sum. Zeros of either sign hash alike: a kernel's layout may lose the sign of a zero.
    """
    values = tensor.detach().reshape(-1)
    total = 0
    for part in values.split(_CHUNK_WORDS * (8 // dtype.itemsize)):
        # Adding zero turns -0.0 into 0.0 and leaves every other value as it is.
        chunk = _as_words(part.to(dtype).add(0.0))
        mixed = chunk * _multipliers(chunk.device)[: len(chunk)]
        # A product moves low bits up only; the fold brings high ones (signs, exponents) down.
        mixed ^= mixed >> 32
        total = (total * _GOLDEN + int(mixed.sum())) & _WORD
    return f"{tuple(tensor.shape)} {total:016x}"


def _as_words(values: Tensor) -> Tensor:
    """View values [N] as 64-bit integers, padded with zeros."""
    per_word = 8 // values.element_size()
    short = -len(values) % per_word
    if short:
        values = torch.nn.functional.pad(values, (0, short))
    return values.view(torch.int64)


@lru_cache(maxsize=4)
def _multipliers(device: torch.device) -> Tensor:
    """Return one odd pseudo-random multiplier per word of a chunk, [_CHUNK_WORDS]."""
    index = torch.arange(1, _CHUNK_WORDS + 1, device=device)
    mixed = index * _GOLDEN
    mixed = (mixed ^ (mixed >> 29)) * _GOLDEN
    return mixed | 1
