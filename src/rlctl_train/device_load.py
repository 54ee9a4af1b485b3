"""How busy this process's accelerator is, sampled beside the work; a CPU's load is processor time, which needs none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rlctl_train import device
from rlctl_train.beside import repeated

EVERY_S = 0.2
"""Drivers renew their figure every sixth of a second to every second."""


ANSWER_S = 1.0
"""Longest wait for a driver's last answer."""


class Load:
    """The share in which the driver saw the accelerator compute."""

    def __init__(self, kind: str) -> None:
        """`kind` is the torch device type."""
        self._kind = kind
        self.samples: list[tuple[int, float]] = []
        """Unix time in nanoseconds, and share."""

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """Sample while the body runs, and at its end: it may be shorter than the interval."""
        if self._kind == "cpu":
            yield
            return
        try:
            with repeated("device load", self._take, EVERY_S, patience_s=ANSWER_S):
                yield
        finally:
            self._take()

    def mean(self) -> float | None:
        """Return the mean share of the body; None where nobody knows."""
        return sum(share for _, share in self.samples) / len(self.samples) if self.samples else None

    def _take(self) -> None:
        share = device.utilization(self._kind)
        if share is not None:
            self.samples.append((time.time_ns(), share))
