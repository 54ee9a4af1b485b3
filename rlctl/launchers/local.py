"""The launcher for this machine: the driver is a process in a session of its own, its output in logs/driver.log."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import psutil

from rlctl.launchers.base import Job, JobStatus, Order
from rlctl.rundir import Run
from rlctl_train.config.errors import FAILED, LAUNCH, UserError
from rlctl_train.config.layout import RunFiles

NAME = "local"
DOOR = (sys.executable, "-m", "rlctl_train")
"""The one way into the workshop; the run folder is its argument."""
_children: dict[int, subprocess.Popen[bytes]] = {}
"""Drivers that this very process has started: it must take their exit codes."""


class LocalLauncher:
    """Runs on this machine."""

    poll_s = 0.2

    def check(self, order: Order) -> None:
        """Refuse nothing: the doctor has looked at this machine already."""

    def preview(self, order: Order) -> dict[str, str]:
        """Return the command of the driver."""
        return {"command": " ".join([*DOOR, str(order.root)])}

    def submit(self, order: Order) -> Job:
        """Start the driver."""
        files = RunFiles(order.root)
        files.logs.mkdir(exist_ok=True)
        with files.driver_log.open("ab") as log:
            try:
                process = subprocess.Popen(
                    [*DOOR, str(order.root)],
                    cwd=order.cwd, env=dict(order.environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                hint = f"go to an existing folder, or check {DOOR[0]}"
                raise UserError(f"the driver cannot be started: {error}", hint, exit_code=LAUNCH) from error
        _children[process.pid] = process
        started = _process_started(process.pid)
        return Job(
            NAME, str(process.pid), socket.gethostname(), str(order.cwd), time.time(), {"process_started": started}
        )

    def status(self, run: Run) -> JobStatus:
        """Return whether the driver lives; one of another host counts as running."""
        job = run.job()
        if job is None:
            return JobStatus("ended")
        pid = int(job.id)
        if pid in _children:
            code = _children[pid].poll()
            return JobStatus("running") if code is None else JobStatus("ended", exit_code=code)
        return JobStatus("running" if _is_alive(job) else "ended")

    def fetch(self, run: Run) -> None:
        """Bring nothing: the files are here."""

    def interrupt(self, run: Run) -> None:
        """Ask the driver to save and leave."""
        job = run.job()
        if job is None or self.status(run).state == "ended":
            return
        if job.host != socket.gethostname():
            raise UserError(
                f"run {run.name!r} runs on {job.host}, not here", f"stop it from {job.host}", exit_code=FAILED
            )
        os.kill(int(job.id), signal.SIGTERM)

    def ask_stacks(self, run: Run) -> None:
        """Leave word in the run folder."""
        run.files.stacks_wanted.touch()

    def kill(self, run: Run) -> None:
        """End the driver and every process of its session."""
        job = run.job()
        if job is not None and job.host == socket.gethostname() and self.status(run).state == "running":
            os.killpg(int(job.id), signal.SIGKILL)


def _is_alive(job: Job) -> bool:
    """Return whether that very process still runs."""
    if job.host != socket.gethostname():
        return True
    try:
        process = psutil.Process(int(job.id))
        same = abs(process.create_time() - job.facts["process_started"]) < 2
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _process_started(pid: int) -> float:
    """Return when a process was made, unix seconds; it tells it from a later one with the same number."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return time.time()
