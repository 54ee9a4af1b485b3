"""What devices did in a profiled run, by whatever its tools wrote beside the ranges; what cannot be read is named."""

from __future__ import annotations

import csv
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rlctl_train.config.errors import UserError, first_line
from rlctl_train.profiling import msprof, nsys, rocprof
from rlctl_train.profiling.traces import TRACE, Event, read_events

TORN = (
    OSError, EOFError, ValueError, LookupError, TypeError, ArithmeticError, csv.Error, sqlite3.Error, zlib.error,
)  # fmt: skip
"""What reading a file that was cut off, or is of another format, ends with."""
Source = tuple[Path, Callable[[Path], list[Event]]]
"""A file or folder and its reader."""


@dataclass
class Found:
    """What was read of all workers."""

    events: dict[str, list[Event]] = field(default_factory=dict)
    """In unix time, by role and rank (`actor-0`)."""
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
        events = found.events.setdefault(name, [])
        for path, read in _sources(folder, name):
            try:
                events += read(path)
            except UserError as error:
                found.unread.append(f"{error.what}: {error.remedy}")
            except TORN as error:
                found.unread.append(f"{path.name} cannot be read: {first_line(error)}")
    return found


def _sources(folder: Path, name: str) -> Iterator[Source]:
    for path in sorted(folder.glob(f"{name}.*")):
        if path.suffix == nsys.EXPORT:
            yield path, nsys.read_export
    for path in sorted(folder.glob(f"{name}_*")):
        if path.name.endswith((rocprof.KERNELS, rocprof.COPIES)):
            yield path, rocprof.read_table
    for path in sorted(folder.glob(f"step_*/{name}{TRACE}")):
        yield path, read_events
    for path in sorted(folder.glob(f"step_*/{name}_*{msprof.FOLDER}")):
        yield path, msprof.read_kernels
        yield path, msprof.read_copies
