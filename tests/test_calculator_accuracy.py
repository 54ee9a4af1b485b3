"""The calculator against published measurements, and the page that says how good it is."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks" / "calibration"


@pytest.fixture(scope="module")
def accuracy() -> Iterator[ModuleType]:
    """The comparison, which is a script's module and no package."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("accuracy")
    sys.path.remove(str(FOLDER))


def test_peaks_of_frameworks_are_met(accuracy: ModuleType):
    found = accuracy.accuracy(accuracy.framework_points())
    assert found.num == 45
    assert found.median <= 0.08
    assert found.p90 <= 0.20
    assert found.under < 0.10


def test_peaks_of_frameworks_are_met_without_knowing_their_code(accuracy: ModuleType):
    found = accuracy.accuracy(accuracy.framework_points(accuracy.frameworks.common_flags))
    assert found.median <= 0.08
    assert found.p90 <= 0.20


def test_peaks_of_megatron_are_met(accuracy: ModuleType):
    found = accuracy.accuracy(accuracy.megatron_points("peak"))
    assert found.num > 450
    assert found.median <= 0.04
    assert found.p90 <= 0.08
    assert found.under < 0.10


def test_steady_states_of_megatron_are_met(accuracy: ModuleType):
    found = accuracy.accuracy(accuracy.megatron_points("steady"))
    assert found.median <= 0.04
    assert found.p90 <= 0.12


def test_stated_out_of_memory_rows_are_refused(accuracy: ModuleType):
    refused = accuracy.refused()
    assert refused and all(refused.values())


def test_rows_left_out_are_left_out_for_a_feature(accuracy: ModuleType):
    rows = accuracy.megatron_ci.rows()
    assert len(rows) == 620
    assert sum(accuracy.not_covered().values()) == len(rows) - len(accuracy.megatron_points("peak"))


def test_the_page_is_current(accuracy: ModuleType, capsys: pytest.CaptureFixture[str]):
    report = importlib.import_module("report")
    assert report.main(["--check"]) == 0, capsys.readouterr().err
