"""What every launcher does: it takes a run folder somewhere, knows how it stands there, and can end it.

A launcher is a module of this package with a class `Launcher` that follows the protocol below; `launch.type` names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rlctl_hw.types import Plan

from rlctl_train.config import RunConfig

if TYPE_CHECKING:
    from rlctl.rundir import Run

TERMS = "resources and uploads"
"""Title, in a preview, of what a launch takes and sends; told before the question where it costs money."""
JobState = Literal["queued", "running", "ended", "unknown"]


@dataclass(frozen=True)
class Job:
    """What a launcher started for a run, as `driver.json` keeps it."""

    launcher: str
    id: str
    """What the launcher calls it: a process, a job or a cluster."""
    host: str
    """The machine it was submitted from."""
    cwd: str
    """The folder it was submitted from: relative paths of the configuration are meant from here."""
    submitted: float
    """Unix seconds."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the launcher must remember beside: an address, the start time of a process."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class JobStatus:
    """Where a job stands, whatever the run in it has written."""

    state: JobState
    """`unknown` where the launcher cannot be asked now."""
    detail: str = ""
    """Why it waits or why nobody knows, in the launcher's words."""
    exit_code: int | None = None
    """Of the driver, where the job has ended and it is known."""


@dataclass(frozen=True)
class Order:
    """A run as a launcher is to start it; the folder need not exist for a preview."""

    root: Path
    """The run folder."""
    config: RunConfig
    plan: Plan
    cwd: Path
    environment: Mapping[str, str]

    @property
    def name(self) -> str:
        """Return the run's name."""
        return self.root.name


class Launcher(Protocol):
    """Takes runs to one kind of place."""

    poll_s: float
    """Seconds between two questions to the launcher while a run is followed."""

    def check(self, order: Order) -> None:
        """Refuse what cannot work there, before anything is written; raises UserError."""
        ...

    def preview(self, order: Order) -> dict[str, str]:
        """Return exactly what `submit` would hand over, by file name or title; writes and starts nothing."""
        ...

    def submit(self, order: Order) -> Job:
        """Start the run's driver there, after `check`, in a folder that exists; raises UserError with exit code 5.

        Where the run goes elsewhere, `launch/` of the folder holds what its environment is made of (`rlctl.farside`).
        """
        ...

    def status(self, run: Run) -> JobStatus:
        """Return where the run's job stands; never raises and never waits for long."""
        ...

    def fetch(self, run: Run) -> None:
        """Bring the run's files here, where they are written elsewhere; the run folder may be read after it."""
        ...

    def interrupt(self, run: Run) -> None:
        """Ask the driver to save and leave, as Ctrl-C does; nothing happens when it is gone."""
        ...

    def ask_stacks(self, run: Run) -> None:
        """Ask the driver of a live run where everyone is; `logs/stacks-TIME.txt` is here once it has been fetched."""
        ...

    def kill(self, run: Run) -> None:
        """End driver and workers at once; nothing is saved."""
        ...
