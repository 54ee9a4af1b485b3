"""Peak memory of this process, phase by phase: what the planner's prediction is held against.

On a CPU it is the resident size, which the kernel tracks (`VmHWM`); on an accelerator what torch's allocator held.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from rlctl_train import device

GIB = 2**30
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Usage:
    """Peaks of one process since the last report, in GiB."""

    place: str
    """The memory it shares with others: a host, or one device of it."""
    peaks_gib: dict[str, float]
    """By phase; phases in which the process did nothing are left out."""
    idle_gib: float
    """Held between phases."""
    allocated_gib: float | None = None
    """Largest amount torch had handed out on the accelerator."""
    used_gib: float | None = None
    """In use on the whole accelerator at the time of the report, by any process and for any purpose."""


@dataclass
class MemoryWatch:
    """Measure the phases of one process; `kind` is the torch device type."""

    kind: str
    _peaks: dict[str, float] = field(default_factory=dict)
    _allocated: float = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Take the peak of the body as the phase's, if it is the largest so far."""
        self._reset()
        try:
            yield
        finally:
            self._peaks[name] = max(self._peaks.get(name, 0.0), self._peak())

    def take(self) -> Usage:
        """Return the peaks since the last call."""
        usage = Usage(_place(self.kind), self._peaks, self._idle())
        if self.kind != "cpu":
            usage = replace(usage, allocated_gib=self._allocated, used_gib=device.used_bytes(self.kind) / GIB)
        self._peaks, self._allocated = {}, 0.0
        return usage

    def _reset(self) -> None:
        if self.kind != "cpu":
            device.reset_peak(self.kind)
        elif os.access(CLEAR, os.W_OK):
            CLEAR.write_text("5")  # the kernel's word for: start the high-water mark again from here

    def _peak(self) -> float:
        if self.kind == "cpu":
            return _resident("VmHWM")
        allocated, reserved = device.peak_bytes(self.kind)
        self._allocated = max(self._allocated, allocated / GIB)
        return reserved / GIB

    def _idle(self) -> float:
        return _resident("VmRSS") if self.kind == "cpu" else device.reserved_bytes(self.kind) / GIB


def by_phase(usages: list[Usage]) -> dict[str, float]:
    """Return the GiB of the fullest place in each phase.

    There it is the peaks of those at work, what the others hold meanwhile, and what no allocator accounts for
    (contexts, communication buffers).
    """
    places: dict[str, list[Usage]] = {}
    for usage in usages:
        places.setdefault(usage.place, []).append(usage)
    phases = dict.fromkeys(name for usage in usages for name in usage.peaks_gib)
    return {name: max(_phase_gib(name, group) for group in places.values()) for name in phases}


def _phase_gib(name: str, group: list[Usage]) -> float:
    used = max((usage.used_gib or 0.0) for usage in group)
    unaccounted = max(0.0, used - sum(usage.idle_gib for usage in group))
    return unaccounted + sum(usage.peaks_gib.get(name, usage.idle_gib) for usage in group)


def _resident(key: str) -> float:
    """Return a size from the kernel's account of this process, in GiB; 0 where there is no such account."""
    if not STATUS.exists():
        return 0.0
    line = next((line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:")), f"{key}: 0 kB")
    return int(line.split()[1]) * 1024 / GIB


def _place(kind: str) -> str:
    host = socket.gethostname()
    if kind == "cpu":
        return host
    return ":".join([host, *(os.environ[name] for name in VISIBLE if os.environ.get(name))])
