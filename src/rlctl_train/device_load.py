"""How busy this process's accelerator is, sampled beside the work; a CPU's load is processor time, which needs none."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rlctl_train import device

EVERY_S = 0.2
"""Drivers renew their figure every sixth of a second to every second."""


class Load:
    """Samples the share in which the driver saw the accelerator compute, while the body runs."""

    def __init__(self, kind: str) -> None:
        """`kind` is the torch device type."""
        self._kind = kind
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self.samples: list[tuple[int, float]] = []
        """Unix time in nanoseconds, and share."""

    def __enter__(self) -> Load:
        if self._kind != "cpu":
            self._thread = threading.Thread(target=self._sample, name="device load", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._take()  # also of a body that was shorter than the interval

    def mean(self) -> float | None:
        """Return the mean share of the body; None where nobody knows."""
        return sum(share for _, share in self.samples) / len(self.samples) if self.samples else None

    def _sample(self) -> None:
        while not self._over.wait(EVERY_S) and self._take():
            pass

    def _take(self) -> bool:
        share = device.utilization(self._kind)
        if share is not None:
            self.samples.append((time.time_ns(), share))
        return share is not None
