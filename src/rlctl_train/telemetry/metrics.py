"""metrics.jsonl: one JSON object a line, in the order things happened, flushed as they happen.

A line is {"step": int, "phase": str, "time": unix seconds, "<room>/<name>": float, ...}. A value that is not
finite has no JSON number: it is left out and named under "non_finite".
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlctl_train.config.layout import RunFiles
from rlctl_train.telemetry.trackers import Tracker, open_trackers

Phase = Literal["warm_start", "train", "validation", "checkpoint"]


class MetricsWriter:
    """Append metrics to the run folder and pass them on to the trackers."""

    def __init__(
        self, files: RunFiles, trackers: Sequence[str], project: str, run_name: str, resume_step: int | None
    ) -> None:
        """Open for a fresh run, or go on after `resume_step` and drop what was written beyond it.

        Trackers open first, so that one that cannot open leaves the file as it was.
        """
        self._trackers: list[Tracker] = open_trackers(trackers, files, project, run_name, resume_step)
        keep_lines_until(files.metrics, resume_step)
        self._file = files.metrics.open("a")

    def log(self, step: int, phase: Phase, metrics: Mapping[str, float]) -> None:
        """Write one line. Trackers get warm-start metrics as `warm_start/<name>`: they are curves of their own."""
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line: dict[str, Any] = {"step": step, "phase": phase, "time": time.time(), **finite}
        if len(finite) < len(values):
            line["non_finite"] = {name: str(values[name]) for name in values if name not in finite}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        prefix = "warm_start/" if phase == "warm_start" else ""
        for tracker in self._trackers:
            tracker.log(step, {prefix + name: value for name, value in finite.items()})

    def close(self) -> None:
        """Close the file and let the trackers finish sending."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file, up to the first torn one; none when there is no file."""
    lines: list[dict[str, Any]] = []
    if not path.is_file():
        return lines
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break  # the process ended in the middle of a write
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines


def keep_lines_until(path: Path, step: int | None) -> None:
    """Cut the file before its first line beyond `step` that is not the warm start's (None: keep nothing), atomically.

    The file is in time order, and the warm start, whose steps count apart, comes first.
    """
    kept: list[dict[str, Any]] = []
    for line in read_metrics(path) if step is not None else []:
        if line["step"] > step:
            break
        kept.append(line)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
