"""Calibration: rates of this machine measured, a short run held against its plan, the result kept and used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rlctl_hw.plan import plan
from rlctl_hw.probe import parse_hardware
from rlctl_hw.types import Corrections, MemoryPart, PhaseBand, PhaseTime, Plan
from typer.testing import CliRunner

from rlctl import app, calibration, machine, planning, resolve
from rlctl.held import Held
from rlctl.workload import shape_of, workload_from_config
from rlctl_train.config.errors import UserError

CPU = parse_hardware("cpu:2")
RATES = Corrections(matmul_tflops=0.2, bandwidth_gb_per_s=10.0)
PLAN = Plan("cpu", 1, 1, 1, 1, "float32", "float32", 1024, 8, 0.0, 0.5)


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLCTL_HOME", str(tmp_path / "home"))


def quickstart(**corrections: Any) -> Plan:
    config = resolve.build("quickstart").config
    return plan(workload_from_config(config, shape_of(config)), replace(CPU, corrections=Corrections(**corrections)))


def test_a_cpu_has_predicted_times_once_it_was_measured() -> None:
    assert quickstart().times == ()
    times = quickstart(matmul_tflops=0.2, bandwidth_gb_per_s=10.0, time_factors={"actor_update": 4.0}).times
    update = next(time for time in times if time.phase == "actor_update")
    assert (update.seconds, update.origin) == (pytest.approx(4.0 * update.roofline_s), "measured")
    assert {time.origin for time in times if time.phase != "actor_update"} == {"assumed"}


def test_measured_overhead_takes_the_place_of_the_assumed() -> None:
    before, after = (
        next(part for part in made.memory if (part.phase, part.part) == ("generation", "overhead"))
        for made in (quickstart(), quickstart(overhead_factor=0.5))
    )
    assert (before.origin, after.origin) == ("assumed", "measured")
    assert after.gib == pytest.approx(before.gib / 2)


def test_a_faster_measured_device_is_predicted_to_be_faster() -> None:
    config = resolve.build("qwen2.5-7b-grpo").config
    workload, machine_there = workload_from_config(config, shape_of(config)), parse_hardware("h100-80gb:8")
    slow, fast = (
        plan(workload, replace(machine_there, corrections=Corrections(matmul_tflops=tflops))) for tflops in (200, 800)
    )
    update_s = [next(t.roofline_s for t in made.times if t.phase == "actor_update") for made in (slow, fast)]
    assert update_s[0] > 1.5 * update_s[1]


def test_factors_are_measured_over_roofline() -> None:
    times = (PhaseTime("generation", 2.0, 1.5, 3.0, "because", 1.0),)
    rows = (Held("generation", measured_s=4.0), Held("checkpoint", measured_s=1.0))
    assert calibration.corrected(RATES, replace(PLAN, times=times), rows) == replace(
        RATES, time_factors={"generation": 4.0}
    )


def test_what_is_more_than_predicted_counts_as_overhead() -> None:
    made = replace(
        PLAN,
        memory=(
            MemoryPart("generation", "weights", 1.0, "formula"),
            MemoryPart("generation", "overhead", 2.0, "assumed"),
        ),
        bands=(PhaseBand("generation", 3.0, 2.5, 3.5),),
    )
    rows = (Held("generation", gib=3.0, measured_gib=4.0),)
    assert calibration.corrected(RATES, made, rows).overhead_factor == 1.5


def test_what_was_kept_is_found_on_this_machine_only() -> None:
    machine.keep(machine.survey(), RATES, {})
    assert machine.here().corrections == RATES
    assert not machine.file_of(parse_hardware("h100-80gb:8")).exists()


def test_a_damaged_file_is_named_with_the_way_out() -> None:
    file = machine.keep(machine.survey(), RATES, {})
    file.write_text('{"corrections": {"speed": 1}}')
    with pytest.raises(UserError, match="cannot be read") as caught:
        planning.hardware_named(None)
    assert "rlctl calibrate" in caught.value.remedy


def test_a_device_that_torch_does_not_see_is_said_to_be_unmeasurable() -> None:
    with pytest.raises(UserError, match="rates cannot be measured"):
        calibration.measured_rates("ascend", 1, {})


def test_this_machine_is_measured_and_its_plans_follow(capfd: pytest.CaptureFixture[str]) -> None:
    done = CliRunner().invoke(app.app, ["calibrate", "--steps", "2", "-o", "json"])
    assert done.exit_code == 0, capfd.readouterr().err
    corrections = json.loads(done.stdout)["corrections"]
    assert corrections["matmul_tflops"] > 0 and corrections["time_factors"]["actor_update"] > 0
    here = planning.hardware_named(None)
    assert planning.plan_here(resolve.build("quickstart").config, here).times
    assert CliRunner().invoke(app.app, ["calibrate", "--forget"]).exit_code == 0
    assert planning.hardware_named(None).corrections == Corrections()
