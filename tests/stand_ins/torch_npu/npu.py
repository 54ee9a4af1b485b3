"""Marks: `torch_npu.npu.mstx`."""

from __future__ import annotations

import time

MARKS: list[tuple[str, int]] = []
"""What was begun and ended, and when in nanoseconds."""
_open: dict[int, str] = {}


class mstx:
    @staticmethod
    def range_start(message: str, stream: object = None, domain: str = "default") -> int:
        number = len(MARKS) + 1
        _open[number] = message
        MARKS.append((f"+{message}", time.time_ns()))
        return number

    @staticmethod
    def range_end(range_id: int, domain: str = "default") -> None:
        MARKS.append((f"-{_open.pop(range_id)}", time.time_ns()))
