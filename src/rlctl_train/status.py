"""The run's status file: one writer (the driver), many readers."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any, Literal

from rlctl_train.config.layout import RunFiles, write_json

State = Literal["starting", "running", "stopped", "done", "failed"]

SETUP = "setup"
"""The phase in which workers start."""


class Status:
    """Rewrites `status.json` whenever the state, the phase or the step changes."""

    def __init__(self, files: RunFiles, num_steps: int) -> None:
        self._path, self._lock = files.status, threading.Lock()
        self.last_progress = time.monotonic()
        now = time.time()
        self._fields: dict[str, Any] = {
            "schema_version": 1, "state": "starting", "phase": SETUP, "step": 0, "num_steps": num_steps,
            "pid": os.getpid(), "host": socket.gethostname(), "started": now, "updated": now,
            "error": None, "exit_code": None, "address": None, "restarts": 0, "notice": None,
        }  # fmt: skip
        self._write()

    def update(self, **fields: Any) -> None:
        """Change fields and write the file; whatever changes is progress."""
        assert fields.keys() <= self._fields.keys(), f"unknown status fields: {fields.keys() - self._fields.keys()}"
        with self._lock:
            self._fields.update(fields)
            self._write()
        self.progress()

    def progress(self) -> None:
        """Take note that the run gets on."""
        self.last_progress = time.monotonic()

    @property
    def phase(self) -> str:
        """What the run is doing."""
        return self._fields["phase"]

    @property
    def is_setup(self) -> bool:
        """Whether workers start, or wait for the devices to do so."""
        return self._fields["phase"] == SETUP

    @property
    def place(self) -> str:
        """Return where the run is: its step and phase."""
        return f"step {self._fields['step']}, phase {self._fields['phase']}"

    def end(self, state: State, exit_code: int, error: dict[str, str] | None = None) -> None:
        """Write the final state."""
        self.update(state=state, phase="ended", exit_code=exit_code, error=error)

    @property
    def exit_code(self) -> int:
        """The exit code given to `end`."""
        return self._fields["exit_code"]

    def _write(self) -> None:
        self._fields["updated"] = time.time()
        write_json(self._path, self._fields, durable=self._fields["exit_code"] is not None)
