"""Ranges of Python's garbage collector, which stops a process wherever it happens to be."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rlctl_train.profiling.ranges import mark

GARBAGE = "garbage collection"
FULL = 2
"""The generation whose collection goes through every object."""


@contextmanager
def collections_marked() -> Iterator[None]:
    """Make every full collection in the body a range."""
    running = ExitStack()

    def told(moment: str, about: dict[str, Any]) -> None:
        if about["generation"] != FULL:
            return
        if moment == "start":
            running.enter_context(mark(GARBAGE))
        else:
            running.close()

    gc.callbacks.append(told)
    try:
        yield
    finally:
        gc.callbacks.remove(told)
        running.close()
