"""Something done again and again beside the work, by a thread that lives as long as a body."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(name: str, act: Callable[[], object], every_s: float, *, patience_s: float = 0.0) -> Iterator[None]:
    """Have a thread `act` every `every_s` seconds while the body runs; at its end a call under way is waited for, at
    most `patience_s`. Whatever `act` raises ends the thread alone."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(every_s):
            act()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(patience_s)
