"""Launchers: each takes a run's driver to one kind of place and can end it; `base` has their contract."""

from __future__ import annotations

import importlib
import time
from typing import TYPE_CHECKING, Any

from rlctl.launchers.base import Launcher

if TYPE_CHECKING:
    from rlctl.rundir import Run
    from rlctl_train.config.launch import CloudLaunch, RayLaunch, SlurmLaunch

LAUNCHERS = {
    "local": "rlctl.launchers.local:LocalLauncher",
    "cloud": "rlctl.launchers.cloud:CloudLauncher",
    "ray": "rlctl.launchers.ray_cluster:RayLauncher",
    "slurm": "rlctl.launchers.slurm:SlurmLauncher",
}
MACHINES = {"ray": "rlctl.launchers.ray_cluster:machine_of"}
"""Launchers that can say what machine they lead to."""
STOP_POLL_S = 0.1


def load(name: str) -> Launcher:
    """Import the launcher of that name."""
    return _object(LAUNCHERS[name])()


def machine_of(config: RayLaunch | SlurmLaunch | CloudLaunch) -> str | None:
    """Return the machine that a launcher finds where it leads, as `DEVICE:COUNT`; None where it cannot be asked."""
    return _object(MACHINES[config.type])(config) if config.type in MACHINES else None


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


def _object(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
