"""A run that ran out of memory says where, what was expected there, and which settings need less."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from ray.exceptions import OutOfMemoryError, RayTaskError
from rlctl_hw.memory import peak_gib
from rlctl_hw.types import MemoryPart, PhaseBand

from rlctl import planning, resolve
from rlctl.commands import _watch
from rlctl.leaner import leaner
from rlctl.rundir import Run
from rlctl_train import __main__, driver
from rlctl_train.config.layout import RunFiles
from rlctl_train.triage import ran_out
from tests import runs

ON_CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation.")


def in_worker(cause: Exception) -> Exception:
    return RayTaskError("update", "traceback", cause)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ON_CUDA, True),
        (in_worker(ON_CUDA), True),
        (RuntimeError("NPU out of memory. Tried to allocate"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (MemoryError("cannot allocate memory"), True),
        (OutOfMemoryError("the node was low on memory"), True),
        (RuntimeError("shape mismatch"), False),
        (in_worker(ValueError("out of memory is what this is not")), False),
    ],
)
def test_an_error_is_told_for_what_it_is(error: Exception, said: bool) -> None:
    assert ran_out(error) is said


def failed(root: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> RunFiles:
    """Let the driver of a run fail in the middle of an update."""
    plan = {
        "bands": (PhaseBand("actor_update", 61.0, 55.0, 70.0), PhaseBand("generation", 20.0, 18.0, 30.0)),
        "memory": (
            MemoryPart("actor_update", "activations", 40.0, "formula"),
            MemoryPart("actor_update", "weights", 10.0, "formula"),
            MemoryPart("generation", "kv cache", 60.0, "formula"),
        ),
        "device_memory_gib": 79.6,
    }
    files = runs.make_run(root, plan=plan)

    def fails(files: RunFiles, config: object, status: object, stop: object) -> None:
        status.update(state="running", phase="update", step=7)  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(driver, "drive", fails)
    monkeypatch.setattr(sys, "argv", ["rlctl_train", str(files.root)])
    assert __main__.main() == 1
    return files


def test_the_status_names_step_phase_part_and_what_was_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = failed(tmp_path / "run", in_worker(ON_CUDA), monkeypatch)
    error = json.loads(files.status.read_text())["error"]
    assert error["kind"] == "out of memory"
    assert error["what"] == (
        "out of memory in step 7, phase update: CUDA out of memory. Tried to allocate 2.00 GiB.; the planner expected "
        "61.00 GiB in actor_update (at most 70.00) of 79.60, most of it activations (40.00 GiB)"
    )


def test_the_status_says_what_the_worker_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = torch.OutOfMemoryError("CUDA out of memory.")
    told.add_note("held then: weights 10.00 GiB, other tensors 60.00 GiB")
    error = json.loads(failed(tmp_path / "run", in_worker(told), monkeypatch).status.read_text())["error"]
    assert "; the worker held weights 10.00 GiB, other tensors 60.00 GiB; the planner expected 61.00" in error["what"]


def test_another_failure_has_no_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = failed(tmp_path / "run", RuntimeError("shape mismatch"), monkeypatch)
    assert "kind" not in json.loads(files.status.read_text())["error"]


@pytest.mark.parametrize(
    ("preset", "machine"), [("qwen2.5-7b-grpo", "h100-80gb:8"), ("qwen2.5-0.5b-grpo", "rtx4090:1")]
)
def test_leaner_settings_are_planned_to_need_less(preset: str, machine: str) -> None:
    hardware = planning.hardware_named(machine)
    config = resolve.build(preset).config
    asked = planning.workload_of(config)
    made = planning.plan_for(asked, hardware)
    found = leaner(asked, hardware, made)
    assert found is not None and found.share == 0.9
    changes = [f"{key}={str(value).lower()}" for key, value in found.settings.items()]
    from rlctl.overrides import parse_arguments

    pinned = resolve.build(preset, overrides=parse_arguments(changes).overrides).config
    less = planning.plan_for(planning.workload_of(pinned), hardware)
    assert peak_gib(less.memory)[1] < peak_gib(made.memory)[1]


def test_where_the_planner_has_nothing_to_give_it_says_so_with_none() -> None:
    hardware = planning.hardware_named("cpu:2")
    asked = planning.workload_of(resolve.build("quickstart").config)
    assert leaner(asked, hardware, planning.plan_for(asked, hardware)) is None


def test_whoever_follows_the_run_is_given_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = failed(tmp_path / "run", ON_CUDA, monkeypatch)
    config = json.loads(resolve.build("qwen2.5-7b-grpo").config.model_dump_json())
    hardware = planning.hardware_named("h100-80gb:8")
    made = planning.plan_for(planning.workload_of(resolve.build("qwen2.5-7b-grpo").config), hardware)
    files.config.write_text(json.dumps(config))
    files.plan.write_text(json.dumps(made.to_json()))
    monkeypatch.setattr(planning, "machine_of", lambda launch: hardware)
    run = Run(files)
    _watch.advise(run, run.status())
    said = capsys.readouterr().err
    assert "out of memory in step 7" in said and "planned for 90% of the memory" in said
    assert "rlctl runs resume run engine.max_tokens_per_micro_batch=" in said
