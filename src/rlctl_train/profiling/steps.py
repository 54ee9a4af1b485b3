"""What the ranges of a profiled step add up to: phases, workers, and the devices that they work on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rlctl_train.config.errors import UserError
from rlctl_train.profiling.spans import Span, clipped, merged, total_s
from rlctl_train.profiling.timeline import SUFFIX, Range, read_ranges

PARTS = "memory.json"
"""In a step's folder, the parts of what the fullest device held in each phase."""
STEP = "step"
"""The driver's range around a whole step."""


@dataclass(frozen=True)
class Worker:
    """One process of a profiled step."""

    role: str
    rank: int
    host: str
    device: str
    ranges: tuple[Range, ...]
    slot: int | None = None
    """Number of the device that it works on; None for one that has no share in any."""
    threads: int = 1
    load: tuple[tuple[int, float], ...] = ()
    """Share in which the device computed, as its driver said at moments of the unix clock."""

    @property
    def name(self) -> str:
        return f"{self.role} {self.rank}"

    def at(self, depth: int) -> list[Range]:
        """Return the ranges that lie inside `depth` others."""
        return [one for one in self.ranges if one.depth == depth]

    def busy(self, within: Span) -> list[Span]:
        """Return when it was at work, without overlaps."""
        return merged(clipped(((one.start_ns, one.end_ns) for one in self.at(0)), within))


@dataclass(frozen=True)
class Device:
    """One device of a run: an accelerator, or on CPU the threads that a worker is given."""

    slot: int
    workers: tuple[Worker, ...]

    @property
    def name(self) -> str:
        return f"{self.workers[0].device} {self.slot}"

    def busy(self, within: Span) -> list[Span]:
        """Return when any of its workers was at work."""
        return merged([span for worker in self.workers for span in worker.busy(within)])

    def computed(self, within: Span) -> float | None:
        """Return the share of a span in which it computed, as processor time or its driver tells; None unknown."""
        if self.workers[0].device == "cpu":
            spent = sum(one.processor_ns * _share_within(one, within) for w in self.workers for one in w.at(0))
            return min(1.0, spent / (within[1] - within[0]) / max(worker.threads for worker in self.workers))
        seen = [share for worker in self.workers for at, share in worker.load if within[0] <= at <= within[1]]
        return sum(seen) / len(seen) if seen else None


@dataclass(frozen=True)
class Phase:
    """One phase of a step, as the driver saw it; a phase may come several times."""

    name: str
    spans: tuple[Span, ...]
    seconds: float
    share: float
    """Of the step."""
    busy_s: dict[str, float]
    """How long each worker was at work in it, by name."""


@dataclass(frozen=True)
class StepProfile:
    """One profiled step of a run."""

    step: int
    driver: Worker
    workers: tuple[Worker, ...]
    parts_gib: dict[str, dict[str, float]]
    """Parts of what the fullest device held, by the workers' phases."""

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """The devices in order."""
        slots = sorted({worker.slot for worker in self.workers if worker.slot is not None})
        return tuple(Device(slot, tuple(w for w in self.workers if w.slot == slot)) for slot in slots)

    @cached_property
    def span(self) -> Span:
        whole = next(one for one in self.driver.ranges if one.name == STEP)
        return whole.start_ns, whole.end_ns

    @property
    def seconds(self) -> float:
        return total_s([self.span])

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The phases in the order of their first beginning."""
        spans: dict[str, list[Span]] = {}
        for one in self.driver.at(1):
            spans.setdefault(one.name, []).append((one.start_ns, one.end_ns))
        return tuple(self._phase(name, tuple(found)) for name, found in spans.items())

    @property
    def between_s(self) -> float:
        """Time of the step that belongs to no phase."""
        return self.seconds - sum(phase.seconds for phase in self.phases)

    def busy_share(self, worker: Worker) -> float:
        """Return the share of the step in which a worker was at work."""
        return total_s(worker.busy(self.span)) / self.seconds

    @cached_property
    def overlap(self) -> float:
        """The share of the step in which workers of two roles or more were at work at once."""
        by_role: dict[str, list[Span]] = {}
        for worker in self.workers:
            by_role.setdefault(worker.role, []).extend(worker.busy(self.span))
        edges = sorted(edge for spans in by_role.values() for s, e in merged(spans) for edge in ((s, 1), (e, -1)))
        together, roles, since = 0, 0, 0
        for at, change in edges:
            if roles > 1:
                together += at - since
            roles, since = roles + change, at
        return together / 1e9 / self.seconds

    @cached_property
    def nobody(self) -> float:
        """The share of the step in which no worker was at work: the driver, Ray, or data on their way."""
        spans = merged([span for worker in self.workers for span in worker.busy(self.span)])
        return 1.0 - total_s(spans) / self.seconds

    def _phase(self, name: str, spans: tuple[Span, ...]) -> Phase:
        seconds = total_s(spans)
        busy = {worker.name: sum(total_s(worker.busy(span)) for span in spans) for worker in self.workers}
        return Phase(name, spans, seconds, seconds / self.seconds, {name: s for name, s in busy.items() if s > 0})


def read_steps(folder: Path) -> list[StepProfile]:
    """Return the profiled steps of a run's profile folder, first to last."""
    found = []
    for step in sorted(folder.glob("step_*")):
        if not (step / f"driver-0{SUFFIX}").exists():
            continue  # the run ended before the step did
        everyone = [_worker(file) for file in sorted(step.glob(f"*{SUFFIX}"))]
        (driver,) = (one for one in everyone if one.role == "driver")
        workers = tuple(one for one in everyone if one.role != "driver")
        parts = json.loads((step / PARTS).read_text()) if (step / PARTS).exists() else {}
        found.append(StepProfile(int(step.name.removeprefix("step_")), driver, workers, parts))
    if not found:
        raise UserError(
            f"{folder} holds no profiled step", "profile one with `rlctl profile PRESET`, or wait for its end"
        )
    return found


def step_folder(folder: Path, step: int) -> Path:
    """Return where a step's files lie in a run's profile folder."""
    return folder / f"step_{step:06d}"


def _worker(file: Path) -> Worker:
    facts, ranges = read_ranges(file)
    load = tuple((at, share) for at, share in facts["load"])
    return Worker(
        facts["role"],
        facts["rank"],
        facts["host"],
        facts["device"],
        tuple(ranges),
        facts["slot"],
        facts["threads"],
        load,
    )


def _share_within(one: Range, within: Span) -> float:
    """Return the share of a range that lies within a span."""
    inside = clipped([(one.start_ns, one.end_ns)], within)
    return total_s(inside) / one.seconds if inside else 0.0
