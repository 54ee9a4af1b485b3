"""Pictures of a run: which panels there are, and how one is drawn. Drawing needs matplotlib, without a display."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Line = dict[str, Any]
"""One line of metrics.jsonl."""

INK, GRID = "#3d4450", "#d9dee6"
COLORS = ("#2f6fde", "#e0703a", "#2d9d78", "#a457c9", "#c2a01b", "#c74363", "#4f9fb8", "#7d7f87", "#8a5a44")
SVG_WIDTH_IN, SVG_HEIGHT_IN = 4.8, 2.9
TITLE_IN = 0.5
LEFT_IN, RIGHT_IN, TOP_IN, BOTTOM_IN = 0.8, 0.15, 0.35, 0.5
"""Around the axes of each panel. A layout engine that measures them draws everything twice."""


@dataclass(frozen=True)
class Panel:
    """One small chart: the metrics (patterns with `*`) of one phase over steps."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    phases: tuple[str, ...] = ("train",)
    stacked: bool = False
    from_zero: bool = False
    log: bool = False
    smooth: bool = False
    """Draw the mean over a tenth of the steps around each step as the line, and the values themselves faintly."""


@dataclass(frozen=True)
class Series:
    """One curve: its metric name, steps and values."""

    name: str
    steps: list[int]
    values: list[float]


TIMES = ("gen", "reward", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor", "update_weights")

PANELS = (
    Panel("Held-out accuracy", "share correct", ("val-core/*/acc/mean@*",), ("validation",), from_zero=True),
    Panel("Training score", "mean score", ("critic/score/mean",), smooth=True),
    Panel("Response length", "tokens, mean", ("response_length/mean",), smooth=True, from_zero=True),
    Panel("Entropy", "nats per token", ("actor/entropy",), smooth=True, from_zero=True),
    Panel("Policy change per update", "nats per token", ("actor/ppo_kl", "actor/kl_loss")),
    Panel("Gradient norm", "L2", ("actor/grad_norm", "critic/grad_norm"), from_zero=True),
    Panel("Critic loss", "", ("critic/vf_loss",), smooth=True, from_zero=True),
    Panel("Sampled against recomputed log-probability", "largest gap, nats", ("health/logprob_gap",), log=True),
    Panel("Where a step's time goes", "seconds", tuple(f"timing_s/{name}" for name in TIMES), stacked=True),
    Panel("Who is at work", "share of the time", ("busy/*",), from_zero=True),
    Panel("Throughput", "tokens/s per device", ("perf/throughput",), smooth=True, from_zero=True),
    Panel("Warm-start loss", "nats per token", ("train/loss",), ("warm_start",), from_zero=True),
    Panel("Supervised loss", "nats per token", ("train/loss", "val/loss"), ("train", "validation"), from_zero=True),
)


def panels_with_data(lines: Sequence[Line]) -> list[tuple[Panel, list[Series]]]:
    """Return the panels that have at least one point, with their curves."""
    found = ((panel, series_of(lines, panel)) for panel in PANELS)
    return [(panel, series) for panel, series in found if series]


def series_of(lines: Sequence[Line], panel: Panel) -> list[Series]:
    """Return the panel's curves in the order of its patterns; a stacked panel fills gaps with zeros."""
    chosen = [line for line in lines if line.get("phase") in panel.phases]
    names = {name for line in chosen for name, value in line.items() if isinstance(value, float)}
    ordered = [name for pattern in panel.metrics for name in sorted(names) if fnmatchcase(name, pattern)]
    if panel.stacked:
        full = [line for line in chosen if any(name in line for name in ordered)]
        steps = [line["step"] for line in full]
        return [Series(name, steps, [line.get(name, 0.0) for line in full]) for name in ordered]
    return [
        Series(name, [line["step"] for line in chosen if name in line], [line[name] for line in chosen if name in line])
        for name in ordered
    ]


def write_png(panels: Sequence[tuple[Panel, list[Series]]], path: Path, title: str) -> None:
    """Draw all panels on one white sheet, three a row."""
    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = _figure(columns, rows, TITLE_IN)
    figure.suptitle(title, color=INK, fontsize=13, fontweight="bold", y=1 - 0.4 * TITLE_IN / figure.get_figheight())
    for number, (panel, series) in enumerate(panels, start=1):
        draw(figure.add_subplot(rows, columns, number), panel, series)
    if not panels:
        figure.text(0.5, 0.5, "no metrics yet", ha="center", va="center", color=INK)
    figure.savefig(path, dpi=110, format="png")


def svg(panel: Panel, series: list[Series]) -> str:
    """Return the panel as inline SVG whose ink and grid take the page's colours, so that it suits any theme."""
    figure = _figure(1, 1)
    draw(figure.add_subplot(), panel, series)
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return text.replace(INK, "currentColor").replace(GRID, "var(--line)")


def _figure(columns: int, rows: int, above_in: float = 0.0) -> Figure:
    """Return a sheet of panels, with room above them."""
    width, height = SVG_WIDTH_IN * columns, SVG_HEIGHT_IN * rows + above_in
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(
        left=LEFT_IN / width,
        right=1 - RIGHT_IN / width,
        top=1 - (TOP_IN + above_in) / height,
        bottom=BOTTOM_IN / height,
        wspace=(LEFT_IN + RIGHT_IN) / (SVG_WIDTH_IN - LEFT_IN - RIGHT_IN),
        hspace=(TOP_IN + BOTTOM_IN) / (SVG_HEIGHT_IN - TOP_IN - BOTTOM_IN),
    )
    return figure


def draw(axes: Axes, panel: Panel, series: list[Series]) -> None:
    """Draw one panel on the given axes."""
    if panel.stacked:
        values = [one.values for one in series]
        axes.stackplot(series[0].steps, values, labels=[_label(s.name) for s in series], colors=COLORS, alpha=0.9)
    else:
        for one, color in zip(series, COLORS * (1 + len(series) // len(COLORS)), strict=False):
            _curve(axes, one, color, smooth=panel.smooth)
    axes.set_title(panel.title, loc="left", color=INK, fontsize=10.5, fontweight="bold")
    axes.set_ylabel(panel.unit, color=INK, fontsize=8.5)
    axes.set_xlabel("step", color=INK, fontsize=8.5)
    axes.tick_params(which="both", colors=INK, labelsize=8, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _scale(axes, panel, series)
    if len(series) > 1:
        place = "upper left" if panel.stacked else "best"
        axes.legend(loc=place, fontsize=7.5, frameon=False, labelcolor=INK, ncols=3 if panel.stacked else 1)


def _scale(axes: Axes, panel: Panel, series: list[Series]) -> None:
    """Set the vertical range: from zero with room above, or logarithmic where every value is positive."""
    values = [value for one in series for value in one.values]
    if panel.log and min(values) > 0:
        axes.set_yscale("log")
    elif panel.stacked:
        axes.set_ylim(0, 1.4 * axes.get_ylim()[1])
    elif panel.from_zero and min(values) >= 0:
        axes.set_ylim(0, 1.1 * max(values) or 1)


def _curve(axes: Axes, series: Series, color: str, *, smooth: bool) -> None:
    few = len(series.steps) <= 40
    if smooth and len(series.values) >= 20:
        axes.plot(series.steps, series.values, color=color, linewidth=0.9, alpha=0.35)
        axes.plot(series.steps, _centred_mean(series.values), color=color, linewidth=2, label=_label(series.name))
        return
    axes.plot(
        series.steps, series.values, color=color, linewidth=2, marker="o" if few else "", markersize=3.5,
        label=_label(series.name),
    )  # fmt: skip


def _centred_mean(values: Sequence[float]) -> list[float]:
    half = max(1, len(values) // 20)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _label(name: str) -> str:
    """Return the part of a metric name that tells curves of one panel apart."""
    return name.removeprefix("timing_s/").replace("val-core/", "").replace("/acc/mean@1", "")
