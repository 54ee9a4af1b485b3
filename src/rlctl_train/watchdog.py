"""The watchdog: says where everyone is when asked, and when a run makes no progress; then ends who stands still."""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ray.exceptions import RayError

from rlctl_train.beside import repeated
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import FAILED
from rlctl_train.config.layout import RunFiles
from rlctl_train.crew import Crew
from rlctl_train.status import Status

LOOK_EVERY_S = 1.0


class Watchdog:
    """Looks for requests, and at the time of the last progress where there is a limit and workers are to make any."""

    def __init__(self, files: RunFiles, status: Status, config: RunConfig) -> None:
        """`files` are those of the whole run, whichever stage of it goes on."""
        self._files, self._status, self._config = files, status, config
        self._crew: Crew | None = None
        self._asking = threading.Lock()
        """Held while workers are asked: nobody leaves Ray meanwhile, which would end the process."""

    def looking(self) -> AbstractContextManager[None]:
        """Look every second while the body runs."""
        return repeated("watchdog", self._look, LOOK_EVERY_S)

    @contextmanager
    def over(self, crew: Crew) -> Iterator[None]:
        """Look after workers for a while."""
        self._status.progress()
        self._crew = crew
        try:
            yield
        finally:
            with self._asking:
                self._crew = None

    def _look(self) -> None:
        with self._asking:
            if self._files.stacks_wanted.exists():
                self._answer(self._crew)
            still_s = time.monotonic() - self._status.last_progress
            if self._crew is not None and still_s >= self._limit_s:
                self._act(self._crew, still_s)

    @property
    def _limit_s(self) -> float:
        """The longest time without progress: workers that start may first wait for their devices."""
        stall_after_s = self._config.health.stall_after_s
        if stall_after_s is None:
            return math.inf
        return stall_after_s + (self._config.ray.start_timeout_s if self._status.is_setup else 0.0)

    def _answer(self, crew: Crew | None) -> None:
        """Write down where everyone is, as somebody has asked by a file; without workers, where the driver is."""
        self._write(f"asked for in {self._status.place}", {} if crew is None else _stacks(crew))
        self._files.stacks_wanted.unlink(missing_ok=True)

    def _act(self, crew: Crew, still_s: float) -> None:
        """Write down where everyone is, and end the workers that are busy; without any, the driver itself."""
        what, since = f"no progress for {still_s:.0f} s in {self._status.place}", self._status.last_progress
        try:
            busy = crew.busy()
        except RayError:
            busy = []
        stacks = _stacks(crew)
        if self._status.last_progress > since:
            return  # it has moved meanwhile
        what = f"{what}; busy: {', '.join(busy) or 'none but the driver'}"
        path = self._write(what, stacks)
        what = f"{what}; {path} shows where everyone was"
        self._status.update(notice=what)
        print(what, file=sys.stderr)
        if busy:
            crew.end(busy, f"stood still for {still_s:.0f} s ({path} shows where)")
        else:
            remedy = f"read {path}; `rlctl runs resume` continues from the last checkpoint"
            self._status.end("failed", FAILED, {"what": what, "remedy": remedy})
            os._exit(FAILED)

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


def _stacks(crew: Crew) -> dict[str, str]:
    try:
        return crew.stacks()
    except RayError as error:
        return {"workers": f"Ray does not answer: {error}"}
