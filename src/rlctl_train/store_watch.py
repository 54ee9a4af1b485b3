"""How full Ray's object stores are, asked beside the work: an answer takes milliseconds, which no step waits for."""

from __future__ import annotations

import threading

import ray
from ray.exceptions import RayError

EVERY_S = 1.0
NAME = "object_store_memory"


class StoreWatch:
    """A thread of the driver that asks Ray again and again, between `start` and `stop`."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._most_gib: float | None = None
        self._last_gib: float | None = None

    def start(self) -> None:
        """Begin to ask the Ray that this process is connected to."""
        address = ray.get_runtime_context().gcs_address
        threading.Thread(target=self._watch, args=(address,), name="object stores", daemon=True).start()

    def stop(self) -> None:
        """Ask no more."""
        self._over.set()

    def take(self) -> float | None:
        """Return the most that was in use since the last call, in GiB over all nodes and by any job; after a call that
        no answer has followed, what was in use last; None before the first answer."""
        most, self._most_gib = self._most_gib, None
        return self._last_gib if most is None else most

    def _watch(self, address: str) -> None:
        while not self._over.is_set():
            try:
                if not ray.is_initialized() or ray.get_runtime_context().gcs_address != address:
                    return  # the run has left this Ray without a word, and may be at another
                used = ray.cluster_resources().get(NAME, 0.0) - ray.available_resources().get(NAME, 0.0)
            except RayError:  # the run learns of a lost cluster by its own calls
                return
            self._last_gib = gib = used / 2**30
            self._most_gib = max(self._most_gib or 0.0, gib)
            self._over.wait(EVERY_S)
