"""Prediction beside measurement: which numbers of a run answer which numbers of its plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rlctl_hw.types import PhaseBand, PhaseTime, Plan

from rlctl import held, rundir
from rlctl_train.config.errors import UserError

PLAN = Plan("cpu", 1, 1, 1, 1, "float32", "float32", 1024, 8, 0.0, 0.5)
BAND = PhaseBand("actor_update", 2.0, 1.5, 2.5)
TIME = PhaseTime("actor_update", 3.0, 2.0, 4.0, "because", 1.0)


def line(phase: str = "train", **metrics: float) -> dict[str, Any]:
    return {"step": 1, "phase": phase} | {name.replace("__", "/"): value for name, value in metrics.items()}


def test_memory_is_the_largest_of_all_steps() -> None:
    plan = replace(PLAN, bands=(BAND,))
    rows = held.against(plan, [line(memory_gib__actor_update=1.8), line(memory_gib__actor_update=1.7)])
    assert [(row.phase, row.gib, row.low_gib, row.high_gib, row.measured_gib) for row in rows] == [
        ("actor_update", 2.0, 1.5, 2.5, 1.8)
    ]


def test_time_is_the_median_without_the_first_step() -> None:
    plan = replace(PLAN, times=(TIME,))
    (row,) = held.against(plan, [line(timing_s__update_actor=s) for s in (30.0, 2.0, 5.0, 3.0)])
    assert (row.seconds, row.low_s, row.high_s, row.measured_s) == (3.0, 2.0, 4.0, 3.0)


def test_what_the_plan_did_not_predict_is_shown_alone() -> None:
    (row,) = held.against(PLAN, [line(timing_s__gen=2.0)])
    assert (row.phase, row.seconds, row.measured_s, row.gib) == ("generation", None, 2.0, None)


def test_a_phase_that_was_not_measured_is_left_out() -> None:
    assert held.against(replace(PLAN, bands=(BAND,), times=(TIME,)), [line(timing_s__step=2.0)]) == ()


def test_validation_and_warm_start_do_not_count() -> None:
    lines = [line("validation", timing_s__gen=9.0), line("warm_start", timing_s__update_actor=9.0)]
    assert held.against(PLAN, lines) == ()


def test_a_plan_of_another_version_is_said_to_be_one(tmp_path: Path) -> None:
    run = rundir.create(tmp_path, "old", config={}, plan={"device": "cpu"}, origin={})
    with pytest.raises(UserError, match="not a plan of this version"):
        run.plan()


def test_a_checkpoint_written_beside_training_is_timed_by_its_writing() -> None:
    lines = [line("checkpoint", timing_s__save_checkpoint=0.1), line(timing_s__write_checkpoint=4.0)]
    (row,) = held.against(PLAN, lines)
    assert (row.phase, row.measured_s) == ("checkpoint", 4.0)
    (row,) = held.against(PLAN, lines[:1])
    assert row.measured_s == 0.1
