"""Peak memory of this process, phase by phase, and how long it works: what the planner's prediction is held against.

On a CPU it is the resident size, which the kernel tracks (`VmHWM`); on an accelerator what torch's allocator held.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch

from rlctl_train import device
from rlctl_train.profiling.ranges import mark

GIB = 2**30
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
STATM, PAGE = Path("/proc/self/statm"), os.sysconf("SC_PAGE_SIZE")
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
    busy_s: float = 0.0
    """Time inside phases."""
    device_s: float | None = None
    """Of that, time in which the device computed: on a CPU processor time over threads; None where nobody knows."""


@dataclass
class MemoryWatch:
    """Measure the phases of one process, each of which is a range too; `kind` is the torch device type."""

    kind: str
    _peaks: dict[str, float] = field(default_factory=dict)
    _allocated: float = 0.0
    _running: list[str] = field(default_factory=list)
    _began: tuple[float, float] = (0.0, 0.0)
    """Wall and processor time at the beginning of the outermost phase that runs."""
    _busy_s: float = 0.0
    _device_s: float | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Take the peak of the body as the phase's, if it is the largest so far; a phase inside counts apart."""
        self._note()
        if not self._running:
            self._began = time.perf_counter(), time.process_time()
        self._running.append(name)
        try:
            with mark(name):
                yield
        finally:
            self._note()
            self._running.pop()
            if not self._running:
                self._take_time()

    def take(self) -> Usage:
        """Return the peaks since the last call."""
        usage = Usage(_place(self.kind), self._peaks, held_bytes(self.kind) / GIB)
        usage = replace(usage, busy_s=self._busy_s, device_s=self._device_s)
        if self.kind != "cpu":
            usage = replace(usage, allocated_gib=self._allocated, used_gib=device.used_bytes(self.kind) / GIB)
        self._peaks, self._allocated, self._busy_s, self._device_s = {}, 0.0, 0.0, None
        return usage

    def _take_time(self) -> None:
        """Count the outermost phase that has just ended."""
        wall, processor = self._began
        seconds = time.perf_counter() - wall
        self._busy_s += seconds
        if self.kind == "cpu":
            computed = (time.process_time() - processor) / torch.get_num_threads()
        elif (share := device.utilization(self.kind)) is not None:
            computed = share * seconds
        else:
            return
        self._device_s = (self._device_s or 0.0) + min(computed, seconds)

    def _note(self) -> None:
        """Give the peak since the last note to the phase that runs, and start again."""
        if self._running:
            name = self._running[-1]
            self._peaks[name] = max(self._peaks.get(name, 0.0), self._peak())
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


def held_bytes(kind: str) -> int:
    """Return what this process holds now: on an accelerator torch's allocator, else the process in memory."""
    if kind != "cpu":
        return device.reserved_bytes(kind)
    return int(STATM.read_text().split()[1]) * PAGE if STATM.exists() else 0


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


def others_gib(pids: Iterable[int]) -> float:
    """Return the resident size of this process and of all below it but `pids`, in GiB: driver, Ray, graders."""
    this, left_out, total = psutil.Process(), set(pids), 0
    for process in (this, *this.children(recursive=True)):
        if process.pid not in left_out:
            with suppress(psutil.Error):  # it may end meanwhile
                total += process.memory_info().rss
    return total / GIB


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
