"""Predicted against measured: one record a row, and the figures that sum up many."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import frameworks
import megatron_ci
from rlctl_hw.calculator import estimate, estimate_stages
from rlctl_hw.setup import Band, Setup

GIB = 2**30
Metric = Literal["peak", "reserved", "steady"]


@dataclass(frozen=True)
class Point:
    """One comparison, in GiB."""

    group: str
    name: str
    measured_gib: float
    predicted: Band

    @property
    def error(self) -> float:
        """Return the relative error; negative where too little was predicted."""
        return self.predicted.gib / self.measured_gib - 1

    @property
    def in_band(self) -> bool:
        """Return whether the measured value lies inside the band."""
        return self.predicted.low_gib <= self.measured_gib <= self.predicted.high_gib


@dataclass(frozen=True)
class Accuracy:
    """What many points say."""

    num: int
    median: float
    p90: float
    under: float
    """Share of rows with more than 5 % too little."""
    in_band: float


def accuracy(points: Sequence[Point]) -> Accuracy:
    """Sum up points."""
    sizes = sorted(abs(point.error) for point in points)
    return Accuracy(
        num=len(points),
        median=statistics.median(sizes),
        p90=sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))],
        under=sum(point.error < -0.05 for point in points) / len(points),
        in_band=sum(point.in_band for point in points) / len(points),
    )


def framework_points(read: Callable[[frameworks.Row], Setup] = frameworks.setup) -> list[Point]:
    """Compare what the allocator reserved at its peak."""
    return [
        Point(row["family"], _name(row), float(row["measured_gib"]), estimate(read(row)).reserved)
        for row in frameworks.rows()
        if row["metric"] == "reserved"
    ]


def megatron_points(metric: Metric) -> list[Point]:
    """Compare peak or steady state of the last rank, which is the one that Megatron logs."""
    column = f"{metric}_bytes"
    return [
        Point(_kind(setup), row["test_case"], int(row[column]) / GIB, getattr(estimate_stages(setup)[-1], metric))
        for row, setup in megatron_ci.covered()
    ]


def refused() -> dict[str, bool]:
    """Return for every stated out-of-memory row whether the calculator refuses it or calls it borderline."""
    return {
        f"{_name(row)} on {row['device']}": estimate(setup).device.high_gib > float(row["measured_gib"])
        for row, setup in frameworks.covered()
        if row["metric"] == "oom"
    }


def not_covered() -> dict[str, int]:
    """Count the rows of Megatron's CI that the calculator leaves out, by feature."""
    names = [megatron_ci.not_covered(row) for row in megatron_ci.rows()]
    return {name: names.count(name) for name in megatron_ci.NOT_COVERED if name in names}


def _kind(setup: Setup) -> str:
    if setup.shape.experts:
        return "experts"
    mesh = setup.mesh
    if mesh.virtual_stages > 1:
        return "dense, interleaved pipeline"
    if mesh.pp > 1:
        return "dense, pipeline"
    return "dense, tensor or data parallel"


def _name(row: frameworks.Row) -> str:
    return f"{row['model'].split('/')[-1]} {row['task']} {row['seq_len']} x{row['gpus']}"
