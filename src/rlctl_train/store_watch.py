"""How full Ray's object stores are, asked beside the work: an answer takes milliseconds, which no step waits for."""

from __future__ import annotations

import threading
from types import TracebackType

import ray
from ray.exceptions import RayError

EVERY_S = 1.0
ANSWER_S = 10.0
"""Longest wait for the last answer, of a cluster that may be lost."""
NAME = "object_store_memory"


class StoreWatch:
    """A thread of the driver that asks Ray again and again while the body runs, and no longer: Ray ends a process that
    leaves in the middle of a question."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="object stores", daemon=True)
        self._most_gib: float | None = None
        self._last_gib: float | None = None

    def __enter__(self) -> StoreWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(ANSWER_S)

    def take(self) -> float | None:
        """Return the most that was in use since the last call, in GiB over all nodes and by any job; after a call that
        no answer has followed, what was in use last; None before the first answer."""
        most, self._most_gib = self._most_gib, None
        return self._last_gib if most is None else most

    def _watch(self) -> None:
        while not self._over.is_set():
            try:
                used = ray.cluster_resources().get(NAME, 0.0) - ray.available_resources().get(NAME, 0.0)
            except RayError:  # the run learns of a lost cluster by its own calls
                return
            self._last_gib = gib = used / 2**30
            self._most_gib = max(self._most_gib or 0.0, gib)
            self._over.wait(EVERY_S)
