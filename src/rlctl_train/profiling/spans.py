"""Spans of time: pairs of begin and end in nanoseconds of the unix clock."""

from __future__ import annotations

from collections.abc import Iterable

Span = tuple[int, int]
"""Begin and end."""


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return spans in order, those that overlap as one."""
    made: list[Span] = []
    for start, end in sorted(spans):
        if made and start <= made[-1][1]:
            made[-1] = made[-1][0], max(made[-1][1], end)
        else:
            made.append((start, end))
    return made


def clipped(spans: Iterable[Span], within: Span) -> list[Span]:
    """Return what of each span lies within another."""
    cut = [(max(start, within[0]), min(end, within[1])) for start, end in spans]
    return [(start, end) for start, end in cut if start < end]


def total_s(spans: Iterable[Span]) -> float:
    """Return the sum of the lengths in seconds."""
    return sum(end - start for start, end in spans) / 1e9


def outside(spans: Iterable[Span], within: Span) -> list[Span]:
    """Return the rest of a span that spans in order, without overlaps, leave."""
    left, at = [], within[0]
    for start, end in spans:
        if start > at:
            left.append((at, start))
        at = max(at, end)
    return [*left, (at, within[1])] if at < within[1] else left
