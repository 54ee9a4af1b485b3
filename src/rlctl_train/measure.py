"""Measure what this machine's device reaches: `python -m rlctl_train.measure cpu|cuda|npu` prints one JSON object.

Matrix products for the computing rate, a copy for the memory's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from rlctl_train import device

REPEATS = 7
SIZES = {"cpu": 1024}
SIZE = 8192
"""Rows and columns of the matrices: large enough that a device is busy with them."""
COPY_BYTES = {"cpu": 2**28}
COPY = 2**31


def main(kind: str) -> dict[str, float]:
    """Return `matmul_tflops`, in the precision that training computes in, and `bandwidth_gb_per_s`."""
    where = device.current(kind)
    dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    size = SIZES.get(kind, SIZE)
    left, right = (torch.randn(size, size, device=where, dtype=dtype) for _ in range(2))
    product_s = _seconds(kind, lambda: left @ right)
    source = torch.ones(COPY_BYTES.get(kind, COPY) // 4, device=where)
    target = torch.empty_like(source)
    copy_s = _seconds(kind, lambda: target.copy_(source))
    copied = 2 * source.numel() * 4  # read once, written once
    return {"matmul_tflops": 2 * size**3 / product_s / 1e12, "bandwidth_gb_per_s": copied / copy_s / 1e9}


def _seconds(kind: str, work: Callable[[], object]) -> float:
    """Return the median time of the work, once it is warm."""
    work()
    taken = []
    for _ in range(REPEATS):
        device.synchronize(kind)
        start = time.perf_counter()
        work()
        device.synchronize(kind)
        taken.append(time.perf_counter() - start)
    return median(taken)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
