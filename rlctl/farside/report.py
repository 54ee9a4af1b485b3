"""What the doctor found on one node of a run: a file a node in `doctor/` of the run folder."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from rlctl import rundir
from rlctl.doctor.finding import Finding, Problem
from rlctl.rundir import Run

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Report:
    """What the doctor found on one node."""

    node: int
    host: str
    when: float
    """Unix seconds."""
    planned: str
    """The machine that was planned for, in words."""
    devices: str
    """The devices found, in words."""
    memory_gib: float
    """Of the smallest device; on CPU, of the host."""
    driver: str | None
    python: str
    packages: dict[str, str]
    """Versions with the label of their build."""
    free_gib: float
    """On the disk of the run folder."""
    findings: tuple[Finding, ...]
    schema_version: int = SCHEMA_VERSION

    @property
    def machine(self) -> str:
        """Return the machine found, in words."""
        return f"{self.devices} of {self.memory_gib:.1f} GiB"

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Return everything that is wrong, what stops the run first."""
        found = [problem for finding in self.findings for problem in finding.problems]
        return tuple(sorted(found, key=lambda problem: problem.status != "fail"))

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {"counts": self.counts}

    @property
    def counts(self) -> dict[str, int]:
        """Return how many checks gave each answer."""
        return dict(Counter(finding.status for finding in self.findings))


def reports(run: Run) -> list[Report]:
    """Return the reports of a run's nodes, in the nodes' order."""
    found = [_read(rundir.read_json(file)) for file in run.files.doctor.glob("node-*.json")]
    return sorted(found, key=lambda report: report.node)


def _read(data: dict[str, Any]) -> Report:
    findings = tuple(
        Finding(**{**finding, "problems": tuple(Problem(**problem) for problem in finding["problems"])})
        for finding in data["findings"]
    )
    known: dict[str, Any] = {key: value for key, value in data.items() if key != "counts"}
    return Report(**{**known, "findings": findings})
