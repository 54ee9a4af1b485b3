"""A scatter plot of predicted against measured memory as one SVG file: both axes logarithmic, no dependency."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from accuracy import Point

WIDTH, HEIGHT, MARGIN = 720, 560, 60
LOW_GIB, HIGH_GIB = 0.3, 120.0
TICKS_GIB = (0.5, 1, 2, 5, 10, 20, 50, 100)
GUIDES = ((1.0, "#444", ""), (1.2, "#aaa", "4 4"), (1 / 1.2, "#aaa", "4 4"))
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")


def scatter(points: Sequence[Point]) -> str:
    """Return the plot: a colour for each group, the diagonal, and lines at 20 % more and less."""
    groups = list(dict.fromkeys(point.group for point in points))
    body = [*_axes(), *_guides(), *_legend(groups)]
    body += [_dot(point, COLOURS[groups.index(point.group) % len(COLOURS)]) for point in points]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([head, *body, "</svg>\n"])


def _axes() -> Iterator[str]:
    left, right, bottom, top = MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN, MARGIN / 2
    yield f'<path d="M{left} {top:.0f}V{bottom}H{right}" fill="none" stroke="#444"/>'
    for tick in TICKS_GIB:
        yield f'<text x="{_x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>'
        yield f'<text x="{left - 8}" y="{_y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
    yield f'<text x="{(left + right) / 2:.0f}" y="{HEIGHT - 14}" text-anchor="middle">measured GiB</text>'
    middle = (top + bottom) / 2
    turned = f'text-anchor="middle" transform="rotate(-90 16 {middle:.0f})"'
    yield f'<text x="16" y="{middle:.0f}" {turned}>predicted GiB</text>'


def _guides() -> Iterator[str]:
    for factor, colour, dashes in GUIDES:
        first, last = max(LOW_GIB, LOW_GIB / factor), min(HIGH_GIB, HIGH_GIB / factor)
        line = f"M{_x(first):.1f} {_y(first * factor):.1f}L{_x(last):.1f} {_y(last * factor):.1f}"
        yield f'<path d="{line}" stroke="{colour}" stroke-dasharray="{dashes}"/>'


def _legend(groups: Sequence[str]) -> Iterator[str]:
    for index, group in enumerate(groups):
        y = MARGIN / 2 + 10 + 18 * index
        yield f'<circle cx="{MARGIN + 16}" cy="{y:.0f}" r="4" fill="{COLOURS[index % len(COLOURS)]}"/>'
        yield f'<text x="{MARGIN + 26}" y="{y + 4:.0f}">{group}</text>'


def _dot(point: Point, colour: str) -> str:
    x, y = _x(point.measured_gib), _y(point.predicted.gib)
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}" fill-opacity="0.55">'
        f"<title>{point.name}: {point.measured_gib:.2f} measured, {point.predicted.gib:.2f} predicted</title></circle>"
    )


def _x(gib: float) -> float:
    return MARGIN + _share(gib) * (WIDTH - 2 * MARGIN)


def _y(gib: float) -> float:
    return HEIGHT - MARGIN - _share(gib) * (HEIGHT - 1.5 * MARGIN)


def _share(gib: float) -> float:
    return math.log(gib / LOW_GIB) / math.log(HIGH_GIB / LOW_GIB)
