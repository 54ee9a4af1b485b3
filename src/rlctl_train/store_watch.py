"""How full Ray's object stores are, asked beside the work: an answer takes milliseconds, which no step waits for."""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress

import ray
from ray.exceptions import RayError

from rlctl_train.beside import repeated

EVERY_S = 1.0
ANSWER_S = 10.0
"""Longest wait for the last answer, of a cluster that may be lost."""
NAME = "object_store_memory"


class StoreWatch:
    """Asks Ray while the body of `asking` runs, and no longer: Ray ends a process that leaves in the middle of a
    question."""

    def __init__(self) -> None:
        self._most_gib: float | None = None
        self._last_gib: float | None = None

    def asking(self) -> AbstractContextManager[None]:
        """Ask every second while the body runs."""
        return repeated("object stores", self.ask, EVERY_S, patience_s=ANSWER_S)

    def take(self) -> float | None:
        """Return the most that was in use since the last call, in GiB over all nodes and by any job; after a call that
        no answer has followed, what was in use last; None before the first answer."""
        most, self._most_gib = self._most_gib, None
        return self._last_gib if most is None else most

    def ask(self) -> None:
        """Ask once; what a lost cluster raises is for the run to see by its own calls."""
        with suppress(RayError):
            used = ray.cluster_resources().get(NAME, 0.0) - ray.available_resources().get(NAME, 0.0)
            self._last_gib = gib = used / 2**30
            self._most_gib = max(self._most_gib or 0.0, gib)
