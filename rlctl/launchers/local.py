"""The launcher for this machine: the driver is a process in a session of its own, its output in logs/driver.log."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from rlctl.rundir import Driver, Run, starting
from rlctl_train.config.errors import FAILED, LAUNCH, UserError
from rlctl_train.config.layout import write_json

NAME = "local"
DOOR = (sys.executable, "-m", "rlctl_train")
"""The one way into the workshop; the run folder is its argument."""
POLL_S = 0.1


def submit(run: Run, *, cwd: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the driver of a run; refuse while one is running."""
    with starting(run):
        run.files.logs.mkdir(exist_ok=True)
        with run.files.driver_log.open("ab") as log:
            try:
                process = subprocess.Popen(
                    [*DOOR, str(run.files.root)],
                    cwd=cwd, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                hint = f"go to an existing folder, or check {DOOR[0]}"
                raise UserError(f"the driver cannot be started: {error}", hint, exit_code=LAUNCH) from error
        write_json(run.files.driver, _record(process.pid, cwd))
    return process


def interrupt(run: Run) -> None:
    """Ask the driver to save and leave, as Ctrl-C does; nothing happens when it is gone."""
    _signal(run, signal.SIGINT)


def kill(run: Run) -> None:
    """End the driver and every process of its session at once; nothing is saved."""
    driver = run.driver()
    if driver is not None and driver.is_alive():
        os.killpg(driver.pid, signal.SIGKILL)


def stop(run: Run, timeout_s: float) -> bool:
    """Ask the driver to save and leave, and wait; return whether it left in time."""
    _signal(run, signal.SIGTERM)
    driver = run.driver()
    deadline = time.monotonic() + timeout_s
    while driver is not None and driver.is_alive():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _signal(run: Run, number: signal.Signals) -> None:
    driver = run.driver()
    if driver is None or not driver.is_alive():
        return
    if driver.host != socket.gethostname():
        raise UserError(
            f"run {run.name!r} runs on {driver.host}, not here", f"stop it from {driver.host}", exit_code=FAILED
        )
    os.kill(driver.pid, number)


def _record(pid: int, cwd: Path) -> dict[str, object]:
    try:
        started = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        started = time.time()
    return vars(Driver(NAME, pid, started, socket.gethostname(), str(cwd)))
