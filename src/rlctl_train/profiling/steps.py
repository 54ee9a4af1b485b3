"""What the ranges of a profiled step add up to: phases, who was busy, who waited for whom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rlctl_train.config.errors import UserError
from rlctl_train.profiling.timeline import SUFFIX, Range, read_ranges

STEP = "step"
"""The driver's range around a whole step."""
Span = tuple[int, int]
"""Start and end in nanoseconds."""


@dataclass(frozen=True)
class Worker:
    """One process of a profiled step."""

    role: str
    rank: int
    host: str
    device: str
    ranges: tuple[Range, ...]

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
        found.append(StepProfile(int(step.name.removeprefix("step_")), driver, workers))
    if not found:
        raise UserError(
            f"{folder} holds no profiled step", "profile one with `rlctl profile PRESET`, or wait for its end"
        )
    return found


def step_folder(folder: Path, step: int) -> Path:
    """Return where a step's files lie in a run's profile folder."""
    return folder / f"step_{step:06d}"


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return spans in order, those that overlap as one."""
    made: list[Span] = []
    for start, end in sorted(spans):
        if made and start <= made[-1][1]:
            made[-1] = made[-1][0], max(made[-1][1], end)
        else:
            made.append((start, end))
    return made


def clipped(spans: Iterable[Span], within: Span) -> list[Span]:
    """Return what of each span lies within another."""
    cut = [(max(start, within[0]), min(end, within[1])) for start, end in spans]
    return [(start, end) for start, end in cut if start < end]


def total_s(spans: Sequence[Span]) -> float:
    """Return the sum of the lengths in seconds."""
    return sum(end - start for start, end in spans) / 1e9


def _worker(file: Path) -> Worker:
    facts, ranges = read_ranges(file)
    return Worker(facts["role"], facts["rank"], facts["host"], facts["device"], tuple(ranges))
