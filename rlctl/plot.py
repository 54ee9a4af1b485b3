"""A curve as a few lines of text: braille dots, two by four to a character."""

from __future__ import annotations

from collections.abc import Sequence

BRAILLE = 0x2800
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bit of the dot at [column][row] inside one braille character, rows from the top."""


def braille(points: Sequence[tuple[float, float]], *, width: int = 60, height: int = 8) -> list[str]:
    """Draw (x, y) points, joined by lines; returns `height` lines of plot with a y axis, and one with the x range."""
    low_x, high_x = points[0][0], points[-1][0]
    low_y, high_y = min(y for _, y in points), max(y for _, y in points)
    if high_y - low_y < 1e-9:
        low_y, high_y = low_y - 0.5, high_y + 0.5
    columns, rows = 2 * width - 1, 4 * height - 1
    dots = [
        (round((x - low_x) / max(high_x - low_x, 1e-9) * columns), round((high_y - y) / (high_y - low_y) * rows))
        for x, y in points
    ]
    cells = [[0] * width for _ in range(height)]
    for start, end in zip(dots, dots[1:] or dots, strict=False):
        for column, row in _line(start, end):
            cells[row // 4][column // 2] |= DOTS[column % 2][row % 4]
    labels = [""] * height
    labels[0], labels[-1] = f"{high_y:.3g}", f"{low_y:.3g}"
    margin = max(len(label) for label in labels)
    lines = [
        f"{label:>{margin}} ┤{''.join(chr(BRAILLE + cell) for cell in row)}".rstrip(chr(BRAILLE))
        for label, row in zip(labels, cells, strict=True)
    ]
    span = f"{high_x:g}"
    return [*lines, f"{'':>{margin}}  {f'{low_x:g}':<{width - len(span)}}{span}  step"]


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (round(start[0] + (end[0] - start[0]) * i / steps), round(start[1] + (end[1] - start[1]) * i / steps))
        for i in range(steps + 1)
    ]
