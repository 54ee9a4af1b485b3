"""Where processes are: the Python stacks of every thread of a worker, whatever it is doing.

A worker writes them to a nameless file when it gets a signal; another process of its node sends that and reads.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray

SIGNAL = signal.SIGUSR2
WRITTEN_WITHIN_S = 10.0
QUIET_S = 0.2
"""Nothing more comes once nothing has come for so long."""
POLL_S = 0.002


@dataclass(frozen=True)
class Whereabouts:
    """Where a worker runs, and where its stacks can be read."""

    node: str
    """Ray's id of the node."""
    process: str
    """Ray's id of the process."""
    host: str
    pid: int
    descriptor: int
    """Of the file that the stacks go to, in the worker."""


class Traceable:
    """A worker whose stacks can be asked for."""

    _stacks: int | None = None

    def whereabouts(self) -> Whereabouts:
        """Be ready to write stacks; return where this worker is."""
        if self._stacks is None:
            self._stacks, name = tempfile.mkstemp()
            Path(name).unlink()  # nothing is left behind, however the worker ends
            faulthandler.register(SIGNAL, self._stacks, all_threads=True)
        here = ray.get_runtime_context()
        return Whereabouts(
            here.get_node_id(), here.get_worker_id(), ray.util.get_node_ip_address(), os.getpid(), self._stacks
        )

    def ping(self) -> None:
        """Answer, once everything asked before is done."""


def read_stacks(pid: int, descriptor: int) -> str:
    """Return the state of a process of this node and the stacks that it writes; one that is stopped stays so."""
    try:
        state = psutil.Process(pid).status()
        file = Path(f"/proc/{pid}/fd/{descriptor}")
        before = file.stat().st_size
        os.kill(pid, SIGNAL)
        if state == psutil.STATUS_STOPPED:
            os.kill(pid, signal.SIGCONT)  # the pending signal comes first
            _wait_for(lambda: file.stat().st_size > before)
            os.kill(pid, signal.SIGSTOP)
        text = _grown(file, before)
    except (OSError, psutil.Error) as error:
        return f"no stacks: {error}"
    return f"{state}\n{text or f'no stacks came within {WRITTEN_WITHIN_S:g} s'}"


def _grown(file: Path, before: int) -> str:
    """Return what a file has more than `before` bytes, once it does not grow any further."""
    _wait_for(lambda: file.stat().st_size > before)
    size = before
    while size < (size := file.stat().st_size):
        time.sleep(QUIET_S)
    return file.read_bytes()[before:].decode(errors="replace")


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WRITTEN_WITHIN_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(POLL_S)
