"""Uploads beside training: one at a time; of several that wait only the newest is sent."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import TracebackType

from rlctl_train.checkpoint.manifest import step_of
from rlctl_train.checkpoint.remote import RemoteError, RemoteStore


class Uploads:
    """Sends complete checkpoints. Leaving its block waits for what is still to be sent, unless by Ctrl-C."""

    def __init__(self, remote: RemoteStore) -> None:
        self._remote = remote
        self.in_use: set[int] = set()
        """Steps that are being sent, or wait for it: nobody may remove them meanwhile."""
        self._lock = threading.Lock()
        self._next: Path | None = None
        self._thread: threading.Thread | None = None
        self.failures = 0
        """Checkpoints that could not be sent so far."""

    def __enter__(self) -> Uploads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, KeyboardInterrupt):
            self.wait()

    def add(self, folder: Path) -> None:
        """Send a checkpoint as soon as the one before is through."""
        with self._lock:
            if self._next is not None:
                self.in_use.discard(step_of(self._next))
            self._next = folder
            self.in_use.add(step_of(folder))
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_all, name="uploads", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Wait until everything is sent, or has failed to be."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _send_all(self) -> None:
        while (folder := self._take()) is not None:
            try:
                self._remote.send(folder)
            except RemoteError as error:
                self.failures += 1
                print(f"{error}; it is kept in {folder}, and training goes on", file=sys.stderr)
            finally:
                self.in_use.discard(step_of(folder))

    def _take(self) -> Path | None:
        with self._lock:
            folder, self._next = self._next, None
            if folder is None:
                self._thread = None
            return folder
