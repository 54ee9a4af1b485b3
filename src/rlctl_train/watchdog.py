"""The watchdog: says where everyone is when asked, and when a run makes no progress; then ends who stands still."""

from __future__ import annotations

import faulthandler
import math
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
    """A thread of the driver that looks for requests, and at the time of the last progress, if there is a limit."""

    def __init__(self, files: RunFiles, status: Status, crew: Crew, config: RunConfig) -> None:
        self._files, self._status, self._crew, self._config = files, status, crew, config
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> None:
        self._status.progress()
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            if self._files.stacks_wanted.exists():
                self._answer()
            still_s = time.monotonic() - self._status.last_progress
            if still_s >= self._limit_s:
                self._act(still_s)

    @property
    def _limit_s(self) -> float:
        """The longest time without progress: workers that start may first wait for their devices."""
        stall_after_s = self._config.health.stall_after_s
        if stall_after_s is None:
            return math.inf
        return stall_after_s + (self._config.ray.start_timeout_s if self._status.is_setup else 0.0)

    def _answer(self) -> None:
        """Write down where everyone is, as somebody has asked by a file."""
        self._write(f"asked for in {self._status.place}", self._stacks())
        self._files.stacks_wanted.unlink(missing_ok=True)

    def _act(self, still_s: float) -> None:
        """Write down where everyone is, and end the workers that are busy; without any, the driver itself."""
        what, since = f"no progress for {still_s:.0f} s in {self._status.place}", self._status.last_progress
        try:
            busy = self._crew.busy()
        except RayError:
            busy = []
        stacks = self._stacks()
        if self._over.is_set() or self._status.last_progress > since:
            return  # it has moved meanwhile
        what = f"{what}; busy: {', '.join(busy) or 'none but the driver'}"
        path = self._write(what, stacks)
        what = f"{what}; {path} shows where everyone was"
        self._status.update(notice=what)
        print(what, file=sys.stderr)
        if busy:
            self._crew.end(busy, f"stood still for {still_s:.0f} s ({path} shows where)")
        else:
            remedy = f"read {path}; `rlctl runs resume` continues from the last checkpoint"
            self._status.end("failed", FAILED, {"what": what, "remedy": remedy})
            os._exit(FAILED)

    def _stacks(self) -> dict[str, str]:
        try:
            return self._crew.stacks()
        except RayError as error:
            return {"workers": f"Ray does not answer: {error}"}

    def _write(self, what: str, stacks: dict[str, str]) -> Path:
        """Write the stacks of the driver and of its workers; a reader sees the file only when it is whole."""
        path = self._files.logs / f"stacks-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        aside = path.with_suffix(".writing")
        with aside.open("w") as file:
            file.write(f"{what}\n\n== driver (process {os.getpid()})\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            for name, text in stacks.items():
                file.write(f"\n== {name}: {text}\n")
        aside.rename(path)
        return path
