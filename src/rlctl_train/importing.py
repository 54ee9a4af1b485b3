"""Importing large libraries, which is most of what the start of a process costs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Let the garbage collector rest: it would go through what is imported again and again, and find nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def keep_for_good() -> None:
    """Leave all objects there are now out of garbage collection for good, as imported modules stay anyway.

    A full collection goes through each of the 400,000 that torch, transformers and Ray make, and takes a quarter of a
    second wherever the process happens to be. Garbage that holds tensors must not be there: it would stay.
    """
    gc.freeze()
