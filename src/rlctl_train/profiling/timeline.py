"""A timeline: the ranges of one process with their times and the memory then held, as one JSON file.

Times are nanoseconds of the unix clock, so that processes, and hosts whose clocks agree, fall on one axis.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlctl_train.config.errors import UserError

SUFFIX = ".ranges.json"
MOMENT = re.compile(r"rlctl unix (\d+)")


@dataclass(frozen=True)
class Range:
    """One range of one process."""

    name: str
    start_ns: int
    end_ns: int
    depth: int
    """Ranges of the same thread around this one."""
    bytes_before: int
    """Memory that the process held when it began: on an accelerator torch's share of it, else the resident size."""
    bytes_after: int
    processor_ns: int = 0
    """Processor time that the process took meanwhile, on all its threads."""

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


class Timeline:
    """Records the ranges of this process; as a listener it is called with each name."""

    def __init__(self, held_bytes: Callable[[], int]) -> None:
        """`held_bytes` tells how much memory the process holds at a moment."""
        self._held_bytes = held_bytes
        self._depths = threading.local()
        self.ranges: list[Range] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Record the body."""
        depth = getattr(self._depths, "now", 0)
        self._depths.now = depth + 1
        before, processor, start = self._held_bytes(), time.process_time_ns(), time.time_ns()
        try:
            yield
        finally:
            end, took = time.time_ns(), time.process_time_ns() - processor
            self.ranges.append(Range(name, start, end, depth, before, self._held_bytes(), took))
            self._depths.now = depth

    def write(self, path: Path, **facts: Any) -> None:
        """Write the ranges in the order they began, with facts about the process."""
        ordered = sorted(self.ranges, key=lambda one: (one.start_ns, one.depth))
        path.write_text(json.dumps({"schema_version": 1, **facts, "ranges": [asdict(one) for one in ordered]}))


def read_ranges(path: Path) -> tuple[dict[str, Any], list[Range]]:
    """Return the facts and the ranges of a file."""
    content = json.loads(path.read_text())
    ranges = [Range(**one) for one in content.pop("ranges")]
    return content, ranges


def moment() -> str:
    """Return a name for a range that begins now, which tells a profiler with a clock of its own the unix time."""
    return f"rlctl unix {time.time_ns()}"


def unix_start(path: Path, marks: Iterable[tuple[str | None, int]]) -> int:
    """Return the unix time of a report's zero in nanoseconds, by names of ranges in it and their beginnings there."""
    for name, start in marks:
        if told := MOMENT.fullmatch(name or ""):
            return int(told[1]) - start
    raise UserError(f"{path.name} tells no unix time", "record markers too, which tell it")
