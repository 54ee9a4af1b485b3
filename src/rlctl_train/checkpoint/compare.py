"""Two checkpoints held against each other, tensor by tensor, in blocks: bits first, then how far numbers are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlctl_train.checkpoint.parts import is_same
from rlctl_train.checkpoint.stored import NamedTensor

BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class TensorDifference:
    """How a tensor that both have differs. Numbers are over all its elements; NaN in both counts as equal."""

    name: str
    dtypes: tuple[torch.dtype, torch.dtype]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    bit_equal: bool
    max_abs: float = 0.0
    """Infinite where one has a NaN or infinity that the other has not."""
    max_rel: float = 0.0
    """Of |a - b| / max(|a|, |b|), 0 where both are 0."""
    mean_abs: float = 0.0
    num_beyond: int = 0
    """Elements with |a - b| > atol + rtol |b|."""

    @property
    def same_shape(self) -> bool:
        """Say whether the shapes are equal, without which no numbers were compared."""
        return self.shapes[0] == self.shapes[1]


@dataclass(frozen=True)
class Comparison:
    """What differs between a and b."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    tensors: tuple[TensorDifference, ...]
    """Those that both have, the worst first."""
    atol: float
    rtol: float

    @property
    def within(self) -> bool:
        """Say whether they agree within the tolerance; with none, also in dtype."""
        if self.only_a or self.only_b:
            return False
        exact = not self.atol and not self.rtol
        return all(
            tensor.same_shape and not tensor.num_beyond and not (exact and tensor.dtypes[0] != tensor.dtypes[1])
            for tensor in self.tensors
        )


def compare(
    a: Mapping[str, NamedTensor],
    b: Mapping[str, NamedTensor],
    *,
    atol: float = 0.0,
    rtol: float = 0.0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Compare every tensor by name; `on_progress` hears of the bytes of `a` that are done, and of all."""
    common = [name for name in a if name in b]
    total, done = sum(a[name].nbytes for name in common), 0
    found: list[TensorDifference] = []
    for name in common:
        found.append(difference(name, a[name], b[name], atol=atol, rtol=rtol))
        done += a[name].nbytes
        on_progress(done, total)
    found.sort(key=lambda one: (one.same_shape, -one.max_abs, one.bit_equal, one.name))
    only_a, only_b = (tuple(name for name in x if name not in y) for x, y in ((a, b), (b, a)))
    return Comparison(only_a, only_b, tuple(found), atol, rtol)


def difference(name: str, a: NamedTensor, b: NamedTensor, *, atol: float = 0.0, rtol: float = 0.0) -> TensorDifference:
    """Compare two tensors."""
    dtypes, shapes = (a.dtype, b.dtype), (tuple(a.shape), tuple(b.shape))
    if shapes[0] != shapes[1]:
        return TensorDifference(name, dtypes, shapes, bit_equal=False)
    bit_equal, max_abs, max_rel, sum_abs, num_beyond = dtypes[0] == dtypes[1], 0.0, 0.0, 0.0, 0
    for x, y in paired(a, b):
        if x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
            continue
        bit_equal = False
        apart, wide = _apart(x.double(), y.double()), y.double().abs()
        max_abs = max(max_abs, float(apart.max()))
        larger = torch.maximum(x.double().abs(), wide)
        max_rel = max(max_rel, float(torch.where(apart == 0, 0.0, apart / larger).nan_to_num(math.inf).max()))
        sum_abs += float(apart.sum())
        num_beyond += int((apart > (atol + rtol * wide).nan_to_num(atol, posinf=atol)).sum())
    size = math.prod(shapes[0])
    return TensorDifference(name, dtypes, shapes, bit_equal, max_abs, max_rel, sum_abs / max(size, 1), num_beyond)


def is_equal(a: NamedTensor, b: NamedTensor) -> bool:
    """Say whether two tensors have the same dtype, shape and bits; stops at the first difference."""
    if is_same(a, b):
        return True
    if a.dtype != b.dtype or tuple(a.shape) != tuple(b.shape):
        return False
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in paired(a, b))


def paired(a: NamedTensor, b: NamedTensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the elements of two tensors of one shape side by side, as flat tensors of equal length."""
    left, right = a.chunks(BLOCK_BYTES), b.chunks(BLOCK_BYTES)
    x, y = next(left, None), next(right, None)
    while x is not None and y is not None:
        num = min(len(x), len(y))
        if num:
            yield x[:num], y[:num]
        x = x[num:] if num < len(x) else next(left, None)
        y = y[num:] if num < len(y) else next(right, None)


def _apart(x: Tensor, y: Tensor) -> Tensor:
    """Return |x - y|; 0 where both are NaN or the same infinity, infinite where only one is either."""
    apart = (x - y).abs()
    apart = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, apart)
    return apart.nan_to_num(nan=math.inf, posinf=math.inf)
