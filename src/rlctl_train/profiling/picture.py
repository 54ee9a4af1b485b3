"""Pictures of profiles as inline SVG: who works when, how much memory each holds, and two steps side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rlctl_train.profiling.steps import StepProfile, Worker
from rlctl_train.telemetry.curves import COLORS

WIDTH, LABELS, LANE, GAP = 1100, 110, 26, 8
TEXT = 'font-size="12" fill="currentColor"'
MOST_BARS = 12
"""Phases that are drawn side by side."""
NARROWEST = 0.6
"""Pixels below which a range is not drawn."""


def lanes(step: StepProfile) -> str:
    """Return a lane for the driver's phases and one for each worker, the ranges inside ranges below them."""
    colors = {phase.name: COLORS[i % len(COLORS)] for i, phase in enumerate(step.phases)}
    rows = [
        (worker, depth) for worker in (step.driver, *step.workers) for depth in (1, 2) if _shown(step, worker, depth)
    ]
    parts = [_axis(step, len(rows) * (LANE + GAP))]
    for number, (worker, depth) in enumerate(rows):
        top = number * (LANE + GAP)
        if depth == 1:
            parts.append(f'<text x="0" y="{top + LANE - 8}" {TEXT}>{escape(worker.name)}</text>')
        for one in worker.at(depth if worker is step.driver else depth - 1):
            left, width = _place(step, one.start_ns, one.end_ns)
            if width < NARROWEST:
                continue
            color = colors.get(one.name) or _phase_color(step, one.start_ns, colors)
            label = f"{one.name}: {one.seconds * 1e3:.3g} ms"
            fit = f'<text x="{left + 4:.1f}" y="{top + LANE - 8}" font-size="11" fill="#fff">{escape(one.name)}</text>'
            parts.append(
                f'<g><title>{escape(label)}</title><rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{LANE}" '
                f'rx="3" fill="{color}" opacity="{1 if depth == 1 else 0.75}"/>'
                f"{fit if width > 7 * len(one.name) + 8 else ''}</g>"
            )
    return _svg(len(rows) * (LANE + GAP) + 24, parts)


def memory(step: StepProfile) -> str:
    """Return each worker's memory over the step, in GiB."""
    height, series = 200, {}
    for worker in step.workers:
        points = [(one.start_ns, one.bytes_before) for one in worker.ranges]
        points += [(one.end_ns, one.bytes_after) for one in worker.ranges]
        inside = sorted(point for point in points if step.span[0] <= point[0] <= step.span[1])
        if len(inside) > 1:
            series[worker.name] = inside
    most = max((held for points in series.values() for _, held in points), default=0)
    if not most:
        return ""
    parts = [_axis(step, height), *_shades(step, height)]
    for number, (name, points) in enumerate(series.items()):
        color = COLORS[number % len(COLORS)]
        path = " ".join(f"{_x(step, at):.1f},{height - 10 - (height - 30) * held / most:.1f}" for at, held in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        label = f"{name}: {max(held for _, held in points) / 2**30:.2f} GiB"
        parts.append(
            f'<text x="{LABELS + 8 + 190 * number}" y="14" font-size="12" fill="{color}">{escape(label)}</text>'
        )
    return _svg(height + 24, parts)


def _shades(step: StepProfile, height: int) -> list[str]:
    """Return the phases as shades behind a curve, named where there is room."""
    parts = []
    for number, phase in enumerate(step.phases):
        for start, end in phase.spans:
            left, width = _place(step, start, end)
            color = COLORS[number % len(COLORS)]
            parts.append(
                f'<rect x="{left:.1f}" y="0" width="{width:.1f}" height="{height}" fill="{color}" opacity="0.09">'
                f"<title>{escape(phase.name)}</title></rect>"
            )
            if width > 7 * len(phase.name):
                parts.append(f'<text x="{left + 4:.1f}" y="{height - 6}" {TEXT}>{escape(phase.name)}</text>')
    return parts


def bars(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return two bars for each row, `first_s` and `second_s`, under the names of the two."""
    drawn = sorted(rows, key=lambda row: -max(row["first_s"] or 0.0, row["second_s"] or 0.0))[:MOST_BARS]
    longest = max((row[key] or 0.0 for row in drawn for key in ("first_s", "second_s")), default=0.0)
    if not longest:
        return ""
    parts = [
        f'<text x="{LABELS + 190 * number}" y="14" font-size="12" fill="{COLORS[number]}">{escape(name)}</text>'
        for number, name in enumerate(names)
    ]
    for number, row in enumerate(drawn):
        top = 26 + number * (LANE + GAP)
        parts.append(f'<text x="0" y="{top + LANE - 8}" {TEXT}>{escape(row["phase"])}</text>')
        for half, key in enumerate(("first_s", "second_s")):
            seconds = row[key] or 0.0
            width, y = (WIDTH - LABELS - 70) * seconds / longest, top + half * LANE / 2
            parts.append(
                f'<rect x="{LABELS}" y="{y}" width="{width:.1f}" height="{LANE / 2 - 1}" fill="{COLORS[half]}"/>'
                f'<text x="{LABELS + width + 6:.1f}" y="{y + 10}" font-size="10" fill="currentColor">'
                f"{seconds:.3g} s</text>"
            )
    return _svg(26 + len(drawn) * (LANE + GAP), parts)


def _shown(step: StepProfile, worker: Worker, depth: int) -> bool:
    return bool(worker.at(depth if worker is step.driver else depth - 1)) and (worker is not step.driver or depth == 1)


def _x(step: StepProfile, at: int) -> float:
    start, end = step.span
    return LABELS + (WIDTH - LABELS) * (at - start) / (end - start)


def _place(step: StepProfile, start: int, end: int) -> tuple[float, float]:
    left, right = (min(WIDTH, max(LABELS, _x(step, at))) for at in (start, end))
    return left, right - left


def _phase_color(step: StepProfile, at: int, colors: dict[str, str]) -> str:
    for phase in step.phases:
        if any(start <= at < end for start, end in phase.spans):
            return colors[phase.name]
    return "#7d7f87"


def _axis(step: StepProfile, height: int) -> str:
    ticks = []
    for number in range(6):
        x, at = LABELS + (WIDTH - LABELS) * number / 5, step.seconds * number / 5
        anchor = "end" if number == 5 else "middle" if number else "start"
        ticks.append(
            f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{height}" stroke="var(--line)"/>'
            f'<text x="{x:.1f}" y="{height + 16}" text-anchor="{anchor}" {TEXT}>{at:.3g} s</text>'
        )
    return "".join(ticks)


def _svg(height: int, parts: list[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
