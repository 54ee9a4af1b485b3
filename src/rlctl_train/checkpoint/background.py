"""Work beside the main thread whose result, or failure, somebody will ask for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(name: str, act: Callable[[], T]) -> Future[T]:
    """Run `act` in a thread that does not keep the process alive; a failure is raised where the result is asked for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:  # handed to whoever asks
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
