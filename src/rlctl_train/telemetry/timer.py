"""How long the parts of a step take. One timer per process; `drain` hands out the metrics and starts afresh."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Timer:
    """Add up the wall time of named parts: `with timer("gen"): ...` becomes the metric `timing_s/gen`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the block to `timing_s/<name>`, also when the block raises."""
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def drain(self) -> dict[str, float]:
        """Return `timing_s/<name>` in seconds since the last drain, and forget them."""
        seconds, self._seconds = self._seconds, {}
        return {f"timing_s/{name}": value for name, value in seconds.items()}
