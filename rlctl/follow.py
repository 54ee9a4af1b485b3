"""Where a run stands, read from its folder as it grows: new metric lines and one record of progress."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `rlctl preset ls` prints without looking at a run, and starts faster so
    from rlctl.rundir import Run, Status

Row = Mapping[str, Any]
RECENT_STEPS = 20


@dataclass(frozen=True)
class Progress:
    """What a person wants to see of a running run."""

    status: Status
    reward: float | None = None
    """Mean score of the last step's responses."""
    accuracy: float | None = None
    """Share of held-out prompts answered right at the last validation."""
    tokens_per_s: float | None = None
    """Tokens per second and device in the last step."""
    left_s: float | None = None
    """Seconds until the last step, at the recent pace."""


class Tail:
    """Reads the complete lines that were added to a file since the last look; starts over when the file shrinks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def lines(self) -> list[str]:
        """Return the new lines, without a last one that is still being written."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            if file.seek(0, 2) < self._offset:
                self._offset = 0
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return complete.decode("utf-8", errors="replace").splitlines()


class Watch:
    """Follows one run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._tail = Tail(run.files.metrics)
        self._seen_until = 0.0
        self._notice = run.status().notice
        self._recent_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last: dict[str, float | None] = {"reward": None, "accuracy": None, "tokens_per_s": None}

    def poll(self) -> list[Row]:
        """Return the metric rows written since the last poll; a restart that drops rows leaves those that were seen."""
        rows = [row for row in parse_rows(self._tail.lines()) if row["time"] > self._seen_until]
        self._seen_until = max([self._seen_until, *(row["time"] for row in rows)])
        for row in rows:
            self._take(row)
        return rows

    def progress(self) -> Progress:
        """Return where the run stands by what was polled so far."""
        status = self._run.status()
        pace = sum(self._recent_s) / len(self._recent_s) if self._recent_s else None
        left = None if pace is None else max(0, status.num_steps - status.step) * pace
        return Progress(status, self._last["reward"], self._last["accuracy"], self._last["tokens_per_s"], left)

    def news(self, status: Status) -> str | None:
        """Return what went wrong since the last call and how it went on, or None."""
        known, self._notice = self._notice, status.notice
        return None if status.notice == known else status.notice

    def _take(self, row: Row) -> None:
        seen = {
            "reward": row.get("critic/score/mean"),
            "accuracy": accuracy(row),
            "tokens_per_s": row.get("perf/throughput"),
        }
        self._last |= {name: value for name, value in seen.items() if value is not None}
        if row.get("phase") == "train" and "timing_s/step" in row:
            self._recent_s.append(row["timing_s/step"])


def accuracy(row: Row) -> float | None:
    """Return the held-out accuracy of a validation row (mean over data sources), or None."""
    values = [v for name, v in row.items() if name.startswith("val-core/") and "/acc/mean@" in name]
    return sum(values) / len(values) if values else None


def parse_rows(lines: list[str]) -> list[Row]:
    """Return the metric rows of complete lines; a line broken by a crash is skipped."""
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def metric_rows(run: Run) -> list[Row]:
    """Return all metric rows of a run; none before the first."""
    return parse_rows(Tail(run.files.metrics).lines())


def curves(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) points of the run's two curves: held-out accuracy and training reward."""
    rows = metric_rows(run)
    found: dict[str, list[tuple[int, float]]] = {"held-out accuracy": [], "reward": []}
    for row in rows:
        if (value := accuracy(row)) is not None:
            found["held-out accuracy"].append((row["step"], value))
        if row.get("phase") == "train" and (score := row.get("critic/score/mean")) is not None:
            found["reward"].append((row["step"], score))
    return {name: points for name, points in found.items() if len(points) > 1}
