"""Launchers: each takes a run's driver to one kind of place and can end it; `base` has their contract."""

from __future__ import annotations

import importlib
import time
from typing import TYPE_CHECKING

from rlctl.launchers.base import Launcher

if TYPE_CHECKING:
    from rlctl.rundir import Run

LAUNCHERS = {
    "local": "rlctl.launchers.local:LocalLauncher",
    "cloud": "rlctl.launchers.cloud:CloudLauncher",
}
STOP_POLL_S = 0.1


def load(name: str) -> Launcher:
    """Import the launcher of that name."""
    module, _, attribute = LAUNCHERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()


def fetch(run: Run) -> None:
    """Bring the files of a run here, where it has a job that writes elsewhere."""
    job = run.job()
    if job is not None:
        load(job.launcher).fetch(run)


def stop(run: Run, timeout_s: float) -> bool:
    """Ask a run to save and leave, and wait; return whether its job ended in time."""
    job = run.job()
    if job is None:
        return True
    launcher = load(job.launcher)
    launcher.interrupt(run)
    deadline = time.monotonic() + timeout_s
    while launcher.status(run).state != "ended":
        if time.monotonic() > deadline:
            return False
        time.sleep(min(STOP_POLL_S, launcher.poll_s))
    return True
