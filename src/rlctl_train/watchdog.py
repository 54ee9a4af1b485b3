"""The watchdog: when a run makes no progress, says where everyone is and ends those who stand still."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from ray.exceptions import RayError

from rlctl_train.config import RunConfig
from rlctl_train.config.errors import FAILED
from rlctl_train.config.layout import RunFiles
from rlctl_train.crew import Crew
from rlctl_train.status import Status

LOOK_EVERY_S = 1.0


class Watchdog:
    """A thread of the driver that looks at the time of the last progress, where the config sets a limit."""

    def __init__(self, files: RunFiles, status: Status, crew: Crew, config: RunConfig) -> None:
        self._files, self._status, self._crew, self._config = files, status, crew, config
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> None:
        if self._config.health.stall_after_s is not None:
            self._status.progress()
            self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            still_s = time.monotonic() - self._status.last_progress
            if still_s >= self._limit_s:
                self._act(still_s)

    @property
    def _limit_s(self) -> float:
        """The longest time without progress: workers that start may first wait for their devices."""
        stall_after_s = self._config.health.stall_after_s
        assert stall_after_s is not None
        return stall_after_s + (self._config.ray.start_timeout_s if self._status.is_setup else 0.0)

    def _act(self, still_s: float) -> None:
        """Write down where everyone is, and end the workers that are busy; without any, the driver itself."""
        what, since = f"no progress for {still_s:.0f} s in {self._status.place}", self._status.last_progress
        try:
            busy, stacks = self._crew.busy(), self._crew.stacks()
        except RayError as error:
            busy, stacks = [], {"workers": f"Ray does not answer: {error}"}
        if self._over.is_set() or self._status.last_progress > since:
            return  # it has moved meanwhile
        path = self._files.logs / f"stacks-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        what = f"{what}; busy: {', '.join(busy) or 'none but the driver'}; {path} shows where everyone was"
        self._status.update(notice=what)
        print(what, file=sys.stderr)
        _write_driver(path, what)
        _add(path, stacks)
        if busy:
            self._crew.end(busy, f"stood still for {still_s:.0f} s ({path} shows where)")
        else:
            remedy = f"read {path}; `rlctl runs resume` continues from the last checkpoint"
            self._status.end("failed", FAILED, {"what": what, "remedy": remedy})
            os._exit(FAILED)


def _write_driver(path: Path, what: str) -> None:
    with path.open("w") as file:
        file.write(f"{what}\n\n== driver (process {os.getpid()})\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def _add(path: Path, stacks: dict[str, str]) -> None:
    with path.open("a") as file:
        for name, text in stacks.items():
            file.write(f"\n== {name}: {text}\n")
