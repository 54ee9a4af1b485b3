"""The log of a SkyPilot job, taken apart: what the driver printed, status, metrics, totals, reports, whole files.

The job prints all but the first as lines that begin with `rlctl::` (sky/driver.sh), so that a run can be read wherever
SkyPilot can show a log: no address, key or bucket is needed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlctl.launchers import home
from rlctl_train.config.layout import RunFiles, write_json
from rlctl_train.config.parcel import LINE_MARK, unpack

PREFIX = re.compile(r"^\((?:head|worker\d+|[^()\s]+), (?:rank=\d+, )?pid=\d+(?:, ip=[\d.:a-f]+)?\)\s?")
"""What SkyPilot writes before each line of a job."""
MARK = "rlctl::"


def store(text: str, files: RunFiles, before: int = 0) -> None:
    """Write what a log says into the run folder; a log seen before changes nothing.

    The first `before` bytes of the driver's output are of earlier jobs and stay. A log in which the run has not said
    anything is kept whole: it tells why.
    """
    printed: list[str] = []
    parcels: list[str] = []
    rows: dict[tuple[Any, Any], str] = {}
    reports: dict[Any, Any] = {}
    last: dict[str, Any] = {}
    for line in _lines(text):
        if line.startswith(LINE_MARK):
            parcels.append(line)
            continue
        kind, found = _marked(line)
        if kind == "metrics":
            rows[found.get("step"), found.get("phase")] = json.dumps(found)
        elif kind == "doctor":
            reports[found.get("node")] = found
        elif kind is not None:
            last[kind] = found
        else:
            printed.append(line)
    if not any((printed, parcels, rows, reports, last)):
        printed = text.splitlines()
    files.logs.mkdir(exist_ok=True)
    earlier = files.driver_log.read_bytes()[:before].decode("utf-8", errors="replace") if before else ""
    _replace(files.driver_log, earlier + _joined(printed))
    if rows:
        _replace(files.metrics, _joined(rows.values()))
    for node, report in reports.items():
        files.doctor.mkdir(exist_ok=True)
        write_json(files.doctor / f"node-{node}.json", report)
    home.bring(files.root, unpack(_joined(parcels), LINE_MARK)[1])
    for kind, path in (("status", files.status), ("summary", files.summary)):
        if kind in last:
            write_json(path, last[kind])


def _lines(text: str) -> Iterator[str]:
    """Yield the lines of the run's nodes, without SkyPilot's own and without its prefix."""
    for line in text.splitlines():
        match = PREFIX.match(line)
        if match is not None:
            yield line[match.end() :]


def _marked(line: str) -> tuple[str | None, Any]:
    """Return (kind, content) of a line that was printed for us, else (None, None)."""
    if not line.startswith(MARK):
        return None, None
    kind, _, content = line.removeprefix(MARK).partition(" ")
    try:
        found = json.loads(content)
    except ValueError:  # cut off, or broken by another line
        return None, None
    return (kind, found) if isinstance(found, dict) else (None, None)


def _joined(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _replace(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
