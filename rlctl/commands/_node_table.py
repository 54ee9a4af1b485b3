"""Showing what the doctor found on the nodes of a run."""

from __future__ import annotations

from collections.abc import Sequence

from rlctl import render
from rlctl.farside.report import Report


def show(found: Sequence[Report]) -> None:
    """Print what the doctor found on each node before training, problems below it."""
    rows = []
    for report in found:
        answers = ", ".join(f"{count} {status}" for status, count in report.counts.items() if status != "skip")
        rows.append((report.node, report.host, report.machine, report.planned, answers))
        rows += [("", problem.status, problem.what, "", "") for problem in report.problems]
    render.table(("NODE", "HOST", "FOUND", "PLANNED", "DOCTOR"), rows)
