"""What devices did in a profiled run, by whatever its tools wrote beside the ranges; what cannot be read is named."""

from __future__ import annotations

import csv
import json
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rlctl_train.config.errors import UserError, first_line
from rlctl_train.profiling import msprof, nsys, rocprof
from rlctl_train.profiling.allocations import HISTORY, Allocation, of_trace
from rlctl_train.profiling.traces import TRACE, Event, events_of, read_trace

TORN = (
    OSError, EOFError, ValueError, LookupError, TypeError, ArithmeticError, csv.Error, sqlite3.Error, zlib.error,
)  # fmt: skip
"""What reading a file that was cut off, or is of another format, ends with."""
Read = tuple[list[Event], list[Allocation]]
Source = tuple[Path, Callable[[Path], Read]]
"""A file or folder and its reader."""


@dataclass
class Found:
    """What was read of all workers."""

    events: dict[str, list[Event]] = field(default_factory=dict)
    """In unix time, by role and rank (`actor-0`)."""
    allocations: dict[str, list[Allocation]] = field(default_factory=dict)
    """Likewise."""
    unread: list[str] = field(default_factory=list)
    """What could not be read, and why."""


def read_devices(folder: Path, workers: Iterable[str]) -> Found:
    """Return what tools recorded of the workers in a run's profile folder."""
    found = Found()
    for report in sorted(folder.glob(f"*{nsys.REPORT}")):
        try:
            nsys.export(report)
        except UserError as error:
            found.unread.append(f"{error.what}: {error.remedy}")
    for name in workers:
        events, allocations = found.events.setdefault(name, []), found.allocations.setdefault(name, [])
        for path, read in _sources(folder, name):
            try:
                ran, asked = read(path)
                events += ran
                allocations += asked
            except UserError as error:
                found.unread.append(f"{error.what}: {error.remedy}")
            except TORN as error:
                found.unread.append(f"{path.name} cannot be read: {first_line(error)}")
    return found


def _sources(folder: Path, name: str) -> Iterator[Source]:
    for path in sorted(folder.glob(f"{name}.*")):
        if path.suffix == nsys.EXPORT:
            yield path, lambda path: (nsys.read_export(path), [])
    for path in sorted(folder.glob(f"{name}_*")):
        if path.name.endswith((rocprof.KERNELS, rocprof.COPIES)):
            yield path, lambda path: (rocprof.read_table(path), [])
    for path in sorted(folder.glob(f"step_*/{name}{TRACE}")):
        yield path, _read_trace
    for path in sorted(folder.glob(f"step_*/{name}_*{msprof.FOLDER}")):
        yield path, lambda path: (msprof.read_kernels(path), [])
        yield path, lambda path: (msprof.read_copies(path), [])


def _read_trace(path: Path) -> Read:
    """Return what a trace tells; of allocations the allocator's own history beside it tells more, if there is one."""
    content = read_trace(path)
    history = path.with_name(path.name.removesuffix(TRACE) + HISTORY)
    if not history.exists():
        return events_of(content), of_trace(content)
    return events_of(content), [Allocation(**one) for one in json.loads(history.read_text())["allocations"]]
