"""What a range costs where nobody listens, and where somebody does; write `ranges.md`.

    python benchmarks/ranges.py

One process, one thread; each figure is the median of seven rounds, less that of an empty loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import median

from torch.profiler import ProfilerActivity, profile, record_function

from rlctl_train.memory_watch import held_bytes
from rlctl_train.profiling.ranges import listening, mark
from rlctl_train.profiling.timeline import Timeline

ROUNDS = 7
RANGES_OF_A_STEP = 200
"""More than a step of the quickstart has in any process."""
STEP_S = 0.25
"""A step of the quickstart (always_on.md)."""
PAGE = Path(__file__).with_name("ranges.md")


def seconds(calls: int, act: Callable[[int], None]) -> float:
    """Return the seconds of one call."""
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        act(calls)
        taken.append((time.perf_counter() - start) / calls)
    return median(taken)


def nothing(calls: int) -> None:
    for _ in range(calls):
        pass


def marked(calls: int) -> None:
    for _ in range(calls):
        with mark("range"):
            pass


def main() -> None:
    empty = seconds(1_000_000, nothing)
    rows = [("nobody listens", seconds(1_000_000, marked) - empty)]
    with listening(Timeline(lambda: held_bytes("cpu"))):
        rows.append(("the timeline", seconds(5_000, marked) - empty))
    with ExitStack() as stack:
        stack.enter_context(profile(activities=[ProfilerActivity.CPU]))
        stack.enter_context(listening(record_function))
        rows.append(("torch.profiler", seconds(5_000, marked) - empty))
    lines = [
        "# What a range costs",
        "",
        f"One `with mark(name)`, one process and thread, {date.today()}. A step of the quickstart has fewer than",
        f"{RANGES_OF_A_STEP} ranges in any process and takes {STEP_S} s at the least.",
        "",
        "| who listens | microseconds a range | share of a step of the quickstart |",
        "|---|---|---|",
        *(f"| {name} | {s * 1e6:.2f} | {RANGES_OF_A_STEP * s / STEP_S:.4%} |" for name, s in rows),
        "",
        "Written by `nox -s bench`.",
        "",
    ]
    PAGE.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
