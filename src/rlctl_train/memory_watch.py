"""Peak memory of this process, phase by phase, and how long it works: what the planner's prediction is held against.

On a CPU it is the resident size, which the kernel tracks (`VmHWM`); on an accelerator what torch's allocator held.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import psutil
import torch

from rlctl_train import device
from rlctl_train.device_load import Load
from rlctl_train.out_of_memory import HELD, account, ran_out
from rlctl_train.profiling.ranges import mark

GIB = 2**30
REST = "rest"
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
    parts_gib: dict[str, dict[str, float]] = field(default_factory=dict)
    """Largest size of each part (weights, gradients, optimizer) by phase, `REST` being what is left now."""


@dataclass
class MemoryWatch:
    """Measure the phases of one process, each of which is a range too; `kind` is the torch device type."""

    kind: str
    inventory: Callable[[], Mapping[str, int]] = dict
    """Tells the bytes of each part that the process holds on its device."""
    _peaks: dict[str, float] = field(default_factory=dict)
    _parts: dict[str, dict[str, float]] = field(default_factory=dict)
    _allocated: float = 0.0
    _running: list[str] = field(default_factory=list)
    _busy_s: float = 0.0
    _device_s: float | None = None

    def __post_init__(self) -> None:
        self._before_gib = held_bytes(self.kind) / GIB if self.kind == "cpu" else 0.0
        """What a process on a CPU is before it holds anything of a model."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Take the peak of the body as the phase's, if it is the largest so far; a phase inside counts apart."""
        self._note()
        timing = nullcontext() if self._running else self._timed()
        self._running.append(name)
        try:
            with timing, mark(name):
                yield
        except Exception as error:
            if ran_out(error) and account(error) is None:  # the innermost phase has told it
                error.add_note(self._account())
            raise
        finally:
            self._note()
            self._running.pop()

    def count_parts(self) -> None:
        """Count what parts there are now into the phase that runs."""
        known = self._parts.setdefault(self._running[-1], {})
        for part, gib in self._held().items():
            known[part] = max(known.get(part, 0.0), gib)

    def take(self) -> Usage:
        """Return the peaks since the last call."""
        usage = Usage(_place(self.kind), self._peaks, held_bytes(self.kind) / GIB)
        parts = self._parts | {REST: self._held()}
        usage = replace(usage, busy_s=self._busy_s, device_s=self._device_s, parts_gib=parts)
        if self.kind != "cpu":
            usage = replace(usage, allocated_gib=self._allocated, used_gib=device.used_bytes(self.kind) / GIB)
        self._peaks, self._parts = {}, {}
        self._allocated, self._busy_s, self._device_s = 0.0, 0.0, None
        return usage

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count the time of an outermost phase, and how much of it the device computed."""
        wall, processor, load = time.perf_counter(), time.process_time(), Load(self.kind)
        try:
            with load.sampled():
                yield
        finally:
            seconds = time.perf_counter() - wall
            self._busy_s += seconds
            if self.kind == "cpu":
                share = (time.process_time() - processor) / torch.get_num_threads() / seconds
            else:
                share = load.mean()
            if share is not None:
                self._device_s = (self._device_s or 0.0) + min(share, 1.0) * seconds

    def _held(self) -> dict[str, float]:
        """Return the GiB of each part that the process holds."""
        held = {part: size / GIB for part, size in self.inventory().items()}
        return held | ({"overhead": self._before_gib} if self._before_gib else {})

    def _account(self) -> str:
        """Return the note that goes with an error that memory ran out: what the process held then."""
        held, reserved = self._held(), held_bytes(self.kind) / GIB
        whole = reserved if self.kind == "cpu" else device.allocated_bytes(self.kind) / GIB
        held["the rest"] = max(0.0, whole - sum(held.values()))
        text = ", ".join(f"{part} {gib:.2f} GiB" for part, gib in held.items() if gib)
        unused = f", and {reserved - whole:.2f} GiB that the allocator keeps unused" if self.kind != "cpu" else ""
        return HELD + text + unused

    def _note(self) -> None:
        """Give the peak since the last note to the phase that runs, and start again."""
        if self._running:
            name = self._running[-1]
            self._peaks[name] = max(self._peaks.get(name, 0.0), self._peak())
        if self.kind != "cpu":
            device.reset_peak(self.kind)
        elif (clear := _opened(CLEAR, os.O_WRONLY, os.getpid())) is not None:
            os.write(clear, b"5")  # the kernel's word for: start the high-water mark again from here

    def _peak(self) -> float:
        if self.kind == "cpu":
            return _most_resident_gib()
        allocated, reserved = device.peak_bytes(self.kind)
        self._allocated = max(self._allocated, allocated / GIB)
        return reserved / GIB


def held_bytes(kind: str) -> int:
    """Return what this process holds now: on an accelerator torch's allocator, else the process in memory."""
    if kind != "cpu":
        return device.reserved_bytes(kind)
    statm = _opened(STATM, os.O_RDONLY, os.getpid())
    return 0 if statm is None else int(os.pread(statm, 128, 0).split()[1]) * PAGE


@cache
def _opened(path: Path, flags: int, pid: int) -> int | None:
    """Open a file of the kernel's account of this process, which is asked many times a step, once; a fork has its own.
    None where there is no such account, or not for us."""
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError:
        return None


def together(usages: Sequence[Usage]) -> Usage:
    """Return what several reports of one process, in their order, come to."""
    last, parts = usages[-1], [usage.parts_gib for usage in usages]
    allocated = [usage.allocated_gib for usage in usages if usage.allocated_gib is not None]
    computed = [usage.device_s for usage in usages if usage.device_s is not None]
    phases = dict.fromkeys(name for one in parts for name in one)
    return replace(
        last,
        peaks_gib=_largest([usage.peaks_gib for usage in usages]),
        allocated_gib=max(allocated, default=None),
        busy_s=sum(usage.busy_s for usage in usages),
        device_s=sum(computed) if computed else None,
        parts_gib={name: _largest([one.get(name, {}) for one in parts]) for name in phases}
        | {REST: parts[-1].get(REST, {})},
    )


def by_phase(usages: list[Usage]) -> dict[str, float]:
    """Return the GiB of the fullest place in each phase.

    There it is the peaks of those at work, what the others hold meanwhile, and what no allocator accounts for
    (contexts, communication buffers).
    """
    return {name: _phase_gib(name, group) for name, group in _fullest(usages).items()}


def parts_by_phase(usages: list[Usage], beside_gib: float) -> dict[str, dict[str, float]]:
    """Return the GiB of each part of the fullest place in each phase; `beside_gib` is what others take there.

    `REST` is what no part accounts for: activations, logits, caches, buffers, fragments.
    """
    found = {}
    for name, group in _fullest(usages).items():
        parts = {"overhead": beside_gib + _unaccounted(group)}
        for usage in group:
            for part, gib in (usage.parts_gib.get(name) or usage.parts_gib.get(REST, {})).items():
                parts[part] = parts.get(part, 0.0) + gib
        parts[REST] = max(0.0, _phase_gib(name, group) + beside_gib - sum(parts.values()))
        found[name] = parts
    return found


def _largest(amounts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the largest of each name."""
    return {
        name: max(one.get(name, 0.0) for one in amounts) for name in dict.fromkeys(n for one in amounts for n in one)
    }


def _fullest(usages: list[Usage]) -> dict[str, list[Usage]]:
    """Return those at the fullest place in each phase."""
    places: dict[str, list[Usage]] = {}
    for usage in usages:
        places.setdefault(usage.place, []).append(usage)
    phases = dict.fromkeys(name for usage in usages for name in usage.peaks_gib)
    return {name: max(places.values(), key=lambda group: _phase_gib(name, group)) for name in phases}


def _phase_gib(name: str, group: list[Usage]) -> float:
    return _unaccounted(group) + sum(usage.peaks_gib.get(name, usage.idle_gib) for usage in group)


def _unaccounted(group: list[Usage]) -> float:
    used = max((usage.used_gib or 0.0) for usage in group)
    return max(0.0, used - sum(usage.idle_gib for usage in group))


def others_gib(pids: Iterable[int]) -> float:
    """Return the resident size of this process and of all below it but `pids`, in GiB: driver, Ray, graders."""
    this, left_out, total = psutil.Process(), set(pids), 0
    for process in (this, *this.children(recursive=True)):
        if process.pid not in left_out:
            with suppress(psutil.Error):  # it may end meanwhile
                total += process.memory_info().rss
    return total / GIB


def _most_resident_gib() -> float:
    """Return the largest resident size since its mark was started again; 0 where the kernel does not tell."""
    status = _opened(STATUS, os.O_RDONLY, os.getpid())
    _, _, rest = (b"" if status is None else os.pread(status, 4096, 0)).partition(b"VmHWM:")
    return int(rest.split(maxsplit=1)[0]) * 1024 / GIB if rest else 0.0


def _place(kind: str) -> str:
    host = socket.gethostname()
    if kind == "cpu":
        return host
    return ":".join([host, *(os.environ[name] for name in VISIBLE if os.environ.get(name))])
