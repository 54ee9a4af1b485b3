"""Work in a child process that kills itself in the middle, as `kill -9` at any moment would."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable


def status_of(act: Callable[[], None], after_lines: int) -> int:
    """Fork, and let the child kill itself after so many lines of all its threads; return its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    left = after_lines

    def count(*_: object) -> object:
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return count

    try:
        threading.settrace(count)  # type: ignore[arg-type]
        sys.settrace(count)  # type: ignore[arg-type]
        act()
    finally:
        os._exit(0)
